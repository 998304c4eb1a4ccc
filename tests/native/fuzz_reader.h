#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

void fuzz_program(const uint8_t* data, size_t size);
int replay_corpus(const std::string& folder);  // every file in it through fuzz_program; how many there were
