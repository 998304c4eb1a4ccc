#include "tuner.h"

#include <algorithm>
#include <chrono>
#include <random>

namespace sparseprune {
namespace {

using Clock = std::chrono::steady_clock;
double since(Clock::time_point t) { return std::chrono::duration<double>(Clock::now() - t).count(); }

// Inputs and outputs of the timed runs.
struct Trial {
    std::vector<std::vector<float>> inputs, outputs;
    std::vector<const float*> in;
    std::vector<float*> out;

    explicit Trial(const Plan& plan) {
        std::mt19937 random(0);
        std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
        const auto floats = [](const Shape& s) {
            size_t n = 1;
            for (int64_t d : s) n *= static_cast<size_t>(d);
            return n;
        };
        for (const Shape& s : plan.input_shapes()) {
            inputs.emplace_back(floats(s));
            for (float& v : inputs.back()) v = uniform(random);
            in.push_back(inputs.back().data());
        }
        for (const Shape& s : plan.output_shapes()) {
            outputs.emplace_back(floats(s));
            out.push_back(outputs.back().data());
        }
    }
};

constexpr int kRuns = 4;       // of each candidate in the first pass; the fastest counts
constexpr int kFinalRuns = 8;  // of the two best in the second
constexpr double kFinalRounds = 4;  // of the first pass that the second may take as long as, and one more

class Tuner {
public:
    Tuner(Program& program, const std::vector<Shape>& shapes, int threads, const Kernels& kernels, double min_gain)
        : program_(program), shapes_(shapes), options_{&kernels, threads}, min_gain_(min_gain),
          base_(std::make_shared<const Plan>(program.shared_graph(), shapes, options_)), trial_(*base_),
          best_(base_->candidates().size()) {
        for (size_t n = 0; n < best_.size(); ++n) best_[n].assign(base_->candidates()[n].size(), 1e30);
    }

    std::vector<TunedLayer> tune(double budget, const std::function<bool(int, int)>& progress) {
        const auto start = Clock::now();
        int rounds = 1;
        for (const auto& c : base_->candidates()) rounds = std::max(rounds, static_cast<int>(c.size()));
        const int total = rounds + 2;
        double longest = 0;  // round
        bool more = true;
        for (int r = 0; r < rounds && more && since(start) + kFinalRounds * longest < budget; ++r) {
            const auto begin = Clock::now();
            time_candidates(kRuns, [&](size_t node) { return static_cast<size_t>(r) % best_[node].size(); });
            longest = std::max(longest, since(begin));
            more = !progress || progress(r + 1, total);
        }
        if (more) {
            // the two best of each layer again, in the company of the others' best
            std::vector<std::vector<size_t>> order(best_.size());
            for (size_t n = 0; n < best_.size(); ++n) order[n] = ranking(n);
            for (size_t place : {size_t{1}, size_t{0}})
                time_candidates(kFinalRuns, [&](size_t node) { return order[node][std::min(place, order[node].size() - 1)]; });
        }
        if (more && progress) progress(total, total);
        return finish();
    }

private:
    std::vector<size_t> ranking(size_t node) const {
        std::vector<size_t> order(best_[node].size());
        for (size_t i = 0; i < order.size(); ++i) order[i] = i;
        const auto cost = [&](size_t i) {
            const bool dense = base_->candidates()[node][i].kind == WeightKind::dense;
            return best_[node][i] / (dense ? min_gain_ : 1.0);
        };
        std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return cost(a) < cost(b); });
        return order;
    }

    template <class Pick>
    void time_candidates(int runs, const Pick& pick) {
        Choices choices(best_.size());
        for (size_t n = 0; n < best_.size(); ++n)
            if (!best_[n].empty()) choices[n] = base_->candidates()[n][pick(n)];
        const Plan plan(program_.shared_graph(), shapes_, options_, choices);
        std::vector<double> seconds;
        plan.run(trial_.in.data(), trial_.out.data());
        for (int i = 0; i < runs; ++i) {
            plan.run(trial_.in.data(), trial_.out.data(), &seconds);
            for (size_t n = 0; n < best_.size(); ++n)
                if (!best_[n].empty()) best_[n][pick(n)] = std::min(best_[n][pick(n)], seconds[n]);
        }
    }

    std::vector<TunedLayer> finish() {
        Choices choices(best_.size());
        std::vector<TunedLayer> layers;
        for (size_t n = 0; n < best_.size(); ++n) {
            if (best_[n].empty()) continue;
            const size_t winner = ranking(n)[0];
            choices[n] = base_->candidates()[n][winner];
            double dense = -1;
            for (size_t i = 0; i < best_[n].size(); ++i)
                if (base_->candidates()[n][i].kind == WeightKind::dense && best_[n][i] < 1e29)
                    dense = dense < 0 ? best_[n][i] : std::min(dense, best_[n][i]);
            layers.push_back({static_cast<int>(n), *choices[n], best_[n][winner], dense, static_cast<int>(best_[n].size())});
        }
        program_.set_choices(options_.kernels->name, shapes_, std::move(choices), options_.threads);
        return layers;
    }

    Program& program_;
    std::vector<Shape> shapes_;
    PlanOptions options_;
    double min_gain_;
    std::shared_ptr<const Plan> base_;
    Trial trial_;
    std::vector<std::vector<double>> best_;  // by node, by candidate: fastest seconds seen
};

}  // namespace

std::vector<TunedLayer> tune(Program& program, const std::vector<Shape>& shapes, int threads, const Kernels& kernels,
                             double budget_seconds, double min_gain, const std::function<bool(int, int)>& progress) {
    return Tuner(program, shapes, threads, kernels, min_gain).tune(budget_seconds, progress);
}

}  // namespace sparseprune
