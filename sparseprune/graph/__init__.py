"""From a torch model to the program's graph: capture (torch.export), lowering, passes, and a float64 reference."""
