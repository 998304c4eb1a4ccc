#include "depth_first.h"

#include <algorithm>
#include <climits>
#include <map>

namespace sparseprune {
namespace {

constexpr Range kNothing{INT64_MAX, INT64_MIN};
constexpr int64_t kManyImages = 8;  // a thread

void extend(Range& range, int64_t begin, int64_t end) {
    range.begin = std::min(range.begin, begin);
    range.end = std::max(range.end, end);
}

// One thread's way through its bands: what is computed already, and what its windows hold.
class Walk {
public:
    Walk(const std::vector<BandLayer>& layers, const std::vector<BandValue>& values, int windows)
        : layers_(layers), values_(values), done_(layers.size(), 0), held_(static_cast<size_t>(windows)), heights_(held_.size(), 0) {
        for (const BandValue& v : values)
            if (v.window >= 0) heights_[static_cast<size_t>(v.window)] = v.height;
    }

    // fresh: the band does not follow the one before
    Band next(int64_t image, Range last, bool fresh) {
        Band band{image, std::vector<Range>(layers_.size()), std::vector<WindowRows>(held_.size())};
        std::vector<Range> needed(values_.size(), kNothing), held(held_.size(), kNothing);
        needed[static_cast<size_t>(layers_.back().output)] = last;
        for (size_t i = layers_.size(); i-- > 0;) {
            const auto value = static_cast<size_t>(layers_[i].output);
            if (needed[value].begin > needed[value].end) needed[value] = {0, 0};
            const int64_t begin = fresh ? needed[value].begin : done_[i];
            band.rows[i] = {begin, std::max(begin, needed[value].end)};
            done_[i] = band.rows[i].end;
            hold(values_[value], band.rows[i], held);
            for (const BandInput& in : layers_[i].inputs) read(in, band.rows[i], needed, held);
        }
        for (size_t w = 0; w < held.size(); ++w) band.windows[w] = move(w, held[w], fresh);
        return band;
    }

private:
    void hold(const BandValue& value, Range rows, std::vector<Range>& held) const {
        if (value.window >= 0) extend(held[static_cast<size_t>(value.window)], rows.begin, rows.end);
    }

    // Where nothing is computed now, the first row that the next one will read is kept all the same.
    void read(const BandInput& in, Range rows, std::vector<Range>& needed, std::vector<Range>& held) const {
        const BandValue& value = values_[static_cast<size_t>(in.value)];
        const Range all{rows.begin * in.stride + in.first, rows.size() > 0 ? (rows.end - 1) * in.stride + in.last + 1 : INT64_MIN};
        const Range inside{std::clamp<int64_t>(all.begin, 0, value.height), std::clamp<int64_t>(all.end, 0, value.height)};
        extend(needed[static_cast<size_t>(in.value)], inside.begin, std::max(inside.begin, inside.end));
        hold(value, in.border ? Range{all.begin, std::max(all.begin, all.end)} : Range{inside.begin, std::max(inside.begin, inside.end)}, held);
    }

    WindowRows move(size_t w, Range rows, bool fresh) {
        WindowRows out;
        Range& before = held_[w];
        if (fresh) before = {rows.begin, rows.begin};
        rows.end = std::max(rows.end, before.end);
        out.rows = rows;
        out.kept = std::max<int64_t>(0, before.end - rows.begin);
        out.kept_at = rows.begin - before.begin;
        if (fresh) out.above = {rows.begin, std::max<int64_t>(rows.begin, std::min<int64_t>(0, rows.end))};
        const int64_t below = std::max({heights_[w], rows.begin, before.end});
        out.below = {std::min(rows.end, below), rows.end};
        before = rows;
        return out;
    }

    const std::vector<BandLayer>& layers_;
    const std::vector<BandValue>& values_;
    std::vector<int64_t> done_;  // rows, by layer
    std::vector<Range> held_;
    std::vector<int64_t> heights_;
};

}  // namespace

bool many_images(int64_t images, int threads) { return images % threads == 0 || images >= kManyImages * threads; }

Schedule make_schedule(const std::vector<BandLayer>& layers, const std::vector<BandValue>& values, int windows, int64_t images,
                       int64_t bands, int threads) {
    Schedule schedule;
    schedule.capacity.assign(static_cast<size_t>(windows), 0);
    schedule.most.assign(layers.size(), 0);
    schedule.busiest.assign(layers.size(), 0);
    const int64_t height = values[static_cast<size_t>(layers.back().output)].height, total = images * bands;
    const bool whole = many_images(images, threads);
    for (int t = 0; t < threads; ++t) {
        Walk walk(layers, values, windows);
        std::vector<Band> own;
        std::vector<int64_t> rows(layers.size(), 0);
        const int64_t image = images * t / threads, repeats = whole ? images * (t + 1) / threads - image : 1;
        const int64_t begin = whole ? image * bands : total * t / threads;
        const int64_t end = whole ? begin + bands : total * (t + 1) / threads;
        for (int64_t b = begin; b < end; ++b) {
            const int64_t at = b % bands;
            own.push_back(walk.next(b / bands, {height * at / bands, height * (at + 1) / bands}, b == begin || at == 0));
            for (size_t l = 0; l < layers.size(); ++l) {
                rows[l] += own.back().rows[l].size();
                schedule.most[l] = std::max(schedule.most[l], own.back().rows[l].size());
            }
            for (size_t w = 0; w < schedule.capacity.size(); ++w)
                schedule.capacity[w] = std::max(schedule.capacity[w], own.back().windows[w].rows.size());
        }
        for (size_t l = 0; l < layers.size(); ++l) schedule.busiest[l] = std::max(schedule.busiest[l], rows[l] * repeats);
        schedule.threads.push_back(std::move(own));
        schedule.repeats.push_back(repeats);
    }
    return schedule;
}

bool computes_once(const Schedule& schedule, size_t layer, int64_t height) {
    std::map<int64_t, std::vector<Range>> rows;  // by image
    for (const auto& bands : schedule.threads)
        for (const Band& b : bands) {
            std::vector<Range>& image = rows[b.image];
            if (b.rows[layer].size() > 0) image.push_back(b.rows[layer]);
        }
    for (auto& [number, image] : rows) {
        std::sort(image.begin(), image.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
        int64_t at = 0;
        for (const Range& r : image) {
            if (r.begin != at) return false;
            at = r.end;
        }
        if (at != height) return false;
    }
    return true;
}

}  // namespace sparseprune
