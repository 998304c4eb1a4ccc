// Every tensor step on random shapes and strides against plain loops in double, an inaccessible page after each buffer; bitwise the
// same for every number of threads; nothing written but elements. Every activation over its whole range.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>

#include "check.h"
#include "cpu/isa.h"
#include "guarded.h"
#include "random.h"
#include "reference.h"
#include "tensor_steps.h"

using namespace sparseprune;

namespace {

constexpr double kEps = 0x1p-23;
constexpr float kInf = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();

using Index = std::array<int64_t, kMaxRank>;

struct Expected {
    double value, bound;
};

bool agrees(float got, const Expected& e) {
    if (std::isnan(e.value)) return std::isnan(got);
    if (std::isinf(e.value) || std::isinf(got)) return got == static_cast<float>(e.value);
    return std::fabs(static_cast<double>(got) - e.value) <= e.bound;
}

// ---- activations

struct Bound {
    Activation act;
    double ulps, absolute;  // |error| <= ulps * ulp(result) + absolute * max(1, |x|)
    float least = -kInf, most = kInf;
};

// The bounds that csrc/cpu/activations.h promises.
const Bound kBounds[] = {
    {{Act::none, 0, 0}, 0, 0},
    {{Act::relu, 0, 0}, 0, 0},
    {{Act::relu6, 0, 0}, 0, 0},
    {{Act::leaky_relu, 0.01f, 0}, 0.51, 0},
    {{Act::leaky_relu, -1.5f, 0}, 0.51, 0},
    {{Act::clamp, -0.3f, 2.5f}, 0, 0},
    {{Act::hardsigmoid, 0, 0}, 2, 0},
    {{Act::hardswish, 0, 0}, 3, 0},
    {{Act::sigmoid, 0, 0}, 3, 1e-38},
    {{Act::silu, 0, 0}, 3, 1e-38},
    {{Act::tanh, 0, 0}, 2, 0},
    {{Act::elu, 1.0f, 0}, 2, 0},
    {{Act::elu, -0.7f, 0}, 2, 0},
    {{Act::gelu, 0, 0}, 2, 2e-7},
    {{Act::gelu_tanh, 0, 0}, 2, 1e-7},
    {{Act::mish, 0, 0}, 5, 1e-42},
    {{Act::softplus, 0, 0}, 2.5, 0},
    {{Act::exp, 0, 0}, 2, 0},
    {{Act::sqrt, 0, 0}, 0.51, 0},
    {{Act::rsqrt, 0, 0}, 1.5, 0},
    {{Act::reciprocal, 0, 0}, 0.51, 0},
    {{Act::abs, 0, 0}, 0, 0},
    {{Act::neg, 0, 0}, 0, 0},
    {{Act::square, 0, 0}, 0.51, 0},
};

std::vector<float> sweep() {
    std::vector<float> x{0.0f, -0.0f, kInf, -kInf, kNan, 1e-40f, -1e-40f, 1e-45f, -1e-45f, 3.4e38f, -3.4e38f};
    for (float v : {88.0f, 88.7f, 88.73f, 89.0f, 104.0f, 103.9f, 103.98f, 20.0f, 3.0f, 6.0f, 0.625f, 87.34f})
        for (float sign : {-1.0f, 1.0f})
            for (float near : {std::nextafter(v, 0.0f), v, std::nextafter(v, kInf)}) x.push_back(sign * near);
    for (double v = -110; v < 110; v += 0x1p-9) x.push_back(static_cast<float>(v + 1e-4 * std::sin(v * 1000)));
    for (double v = -9; v < 9; v += 0x1p-12) x.push_back(static_cast<float>(v + 1e-5 * std::sin(v * 1000)));
    for (double exponent = -149; exponent < 128; exponent += 0.01)
        for (double sign : {-1.0, 1.0}) x.push_back(static_cast<float>(sign * std::exp2(exponent)));
    return x;
}

double ulp_of(double value) {
    const double size = std::max(std::fabs(value), 0x1p-126);
    return std::exp2(std::floor(std::log2(size)) - 23);
}

void check_activation(const Kernels& k, const Bound& b, const std::vector<float>& x) {
    std::vector<float> y(x.size());
    k.act_row(x.data(), y.data(), static_cast<int64_t>(x.size()), b.act);
    double worst = 0, worst_at = 0;
    size_t bad = 0;
    for (size_t i = 0; i < x.size(); ++i) {
        const double at = static_cast<double>(x[i]), want = act_reference(b.act, at);
        const Expected e{want, b.ulps * ulp_of(want) + b.absolute * std::clamp(std::fabs(at), 1.0, 1e30)};
        if (!agrees(y[i], e)) {
            if (bad++ < 3) std::printf("act %d of %a: %a, expected %a\n", static_cast<int>(b.act.kind), at, static_cast<double>(y[i]), want);
        }
        const double slack = e.bound - b.ulps * ulp_of(want);
        const double error = std::isfinite(want) && std::isfinite(y[i]) ? (std::fabs(static_cast<double>(y[i]) - want) - slack) / ulp_of(want) : 0;
        if (error > worst) {
            worst = error;
            worst_at = at;
        }
    }
    CHECK(bad == 0);
    if (std::getenv("SPARSEPRUNE_ERRORS")) std::printf("%s act %d: %.2f ulp at %g\n", k.name, static_cast<int>(b.act.kind), worst, worst_at);
    // any length, in place, nothing beyond it
    for (int64_t count = 0; count < 40; ++count) {
        const size_t n = static_cast<size_t>(count);
        Guarded in(n), out(n);
        std::memcpy(in.data(), x.data() + 20, n * 4);
        k.act_row(in.data(), out.data(), count, b.act);
        CHECK(std::memcmp(out.data(), y.data() + 20, n * 4) == 0);
        k.act_row(in.data(), in.data(), count, b.act);
        CHECK(std::memcmp(in.data(), y.data() + 20, n * 4) == 0);
    }
}

// ---- values at random places

struct Value {
    Strided at;
    std::shared_ptr<Guarded> buffer;
    float* data() const { return buffer->data(); }
    int64_t place(const Index& i) const {
        int64_t p = at.offset;
        for (size_t d = 0; d < static_cast<size_t>(at.rank); ++d) p += i[d] * at.stride[d];
        return p;
    }
    double operator()(const Index& i) const { return static_cast<double>(data()[place(i)]); }
};

using Sizes = std::vector<int64_t>;

// Strides of a random order of the dimensions, with gaps; every element has its own place.
Strided random_strides(Random& r, const Sizes& sizes) {
    Strided s;
    s.rank = static_cast<int>(sizes.size());
    std::vector<size_t> order(sizes.size());
    for (size_t d = 0; d < order.size(); ++d) order[d] = d;
    const bool plain = one_in(r, 3), gaps = one_in(r, 2);
    if (!plain) std::shuffle(order.begin(), order.end(), r);
    int64_t stride = gaps && one_in(r, 6) ? 2 : 1;
    for (size_t i = order.size(); i-- > 0;) {
        const size_t d = order[i];
        s.size[d] = sizes[d];
        s.stride[d] = stride;
        stride *= sizes[d];
        if (gaps && one_in(r, 2)) stride += pick(r, 0, 5);
    }
    s.offset = gaps ? pick(r, 0, 5) : 0;
    return s;
}

size_t span(const Strided& s) {
    int64_t last = s.offset;
    for (size_t d = 0; d < static_cast<size_t>(s.rank); ++d) last += (s.size[d] - 1) * s.stride[d];
    return static_cast<size_t>(last + 1);
}

Value random_value(Random& r, const Sizes& sizes, bool special, bool broadcast = false) {
    Strided s = random_strides(r, sizes);
    if (broadcast) {
        Sizes kept = sizes;
        std::vector<bool> repeated(sizes.size());
        for (size_t d = 0; d < sizes.size(); ++d)
            if (one_in(r, 2)) {
                repeated[d] = true;
                kept[d] = 1;
            }
        s = random_strides(r, kept);
        for (size_t d = 0; d < sizes.size(); ++d) {
            s.size[d] = sizes[d];
            if (repeated[d]) s.stride[d] = 0;
        }
    }
    const Value v{s, std::make_shared<Guarded>(span(s))};
    const float strange[] = {kNan, kInf, -kInf, 0.0f, -0.0f, 1e-40f};
    for (size_t i = 0; i < v.buffer->size(); ++i)
        v.data()[i] = special && r.element() < 0.025 ? strange[static_cast<size_t>(r.element() * 6)] : r.real(-2.0f, 2.0f);
    return v;
}

Sizes random_sizes(Random& r, int low = 0, int high = 6) {
    Sizes sizes(static_cast<size_t>(pick(r, low, high)));
    const int64_t small[] = {1, 1, 2, 3, 4, 5, 7}, large[] = {1, 13, 16, 17, 31, 32, 64, 67, 131, 1031};
    for (int64_t& s : sizes) s = small[pick(r, 0, 6)];
    if (!sizes.empty() && one_in(r, 2)) sizes[static_cast<size_t>(pick(r, 0, static_cast<int64_t>(sizes.size()) - 1))] = large[pick(r, 0, 9)];
    if (sizes.size() > 1 && sizes.size() < 4 && one_in(r, 2))
        for (int64_t& s : sizes) s = large[pick(r, 0, 8)];
    const int64_t most = r.small() ? 1100 : 40000;
    int64_t n = 1;
    for (int64_t& s : sizes) {
        if (n * s > most) s = 1;
        n *= s;
    }
    return sizes;
}

template <class F>
void for_indices(const Sizes& sizes, F f) {
    Index i{};
    for (;;) {
        f(i);
        size_t d = sizes.size();
        for (; d > 0; --d) {
            if (++i[d - 1] < sizes[d - 1]) break;
            i[d - 1] = 0;
        }
        if (d == 0) return;
    }
}

Sizes sizes_of(const Strided& s) { return Sizes(s.size.begin(), s.size.begin() + s.rank); }

std::string describe(const Strided& s) {
    return to_string(sizes_of(s)) + " strides " + to_string(Sizes(s.stride.begin(), s.stride.begin() + s.rank)) + " + " + std::to_string(s.offset);
}

constexpr uint32_t kUntouched = 0xFFABCDEF;  // a NaN that no operator makes

// Bitwise; but of a NaN that was computed, IEEE 754 leaves sign and payload open, and compilers exchange the operands of a sum.
bool same_number(float a, float b) {
    uint32_t bits[2];
    std::memcpy(bits, &a, 4);
    std::memcpy(bits + 1, &b, 4);
    return bits[0] == bits[1] || (std::isnan(a) && std::isnan(b) && bits[0] != kUntouched && bits[1] != kUntouched);
}

// Runs a step with 1 to 4 parts and compares the output's elements with what is expected of each.
void check_step(const std::string& what, const Strided& to, const std::function<void(float*, Part)>& run,
                const std::function<Expected(const Index&)>& expected) {
    const size_t size = span(to);
    std::vector<float> first;
    for (int count = 1; count <= 4; ++count) {
        Guarded out(size);
        for (size_t i = 0; i < size; ++i) std::memcpy(out.data() + i, &kUntouched, 4);
        for (int id = count; id-- > 0;) run(out.data(), Part{id, count});
        if (count > 1) {
            size_t at = 0;
            while (at < size && same_number(first[at], out.data()[at])) ++at;
            const bool same = at == size;
            if (!same)
                std::printf("%s: %d parts differ from one, first at %zu: %a, %a\n", what.c_str(), count, at,
                            static_cast<double>(out.data()[at]), static_cast<double>(first[at]));
            CHECK(same);
            continue;
        }
        first.assign(out.data(), out.data() + size);
        size_t bad = 0;
        for_indices(sizes_of(to), [&](const Index& i) {
            int64_t p = to.offset;
            for (size_t d = 0; d < static_cast<size_t>(to.rank); ++d) p += i[d] * to.stride[d];
            const Expected e = expected(i);
            if (!agrees(out.data()[p], e) && bad++ < 3)
                std::printf("%s: at %lld: %g, expected %g +- %g\n", what.c_str(), static_cast<long long>(p),
                            static_cast<double>(out.data()[p]), e.value, e.bound);
            std::memcpy(out.data() + p, &kUntouched, 4);
        });
        for (size_t i = 0; i < size; ++i) bad += std::memcmp(out.data() + i, &kUntouched, 4) != 0;
        CHECK(bad == 0);
    }
}

std::string named(const Kernels& k, const char* step, std::initializer_list<const Strided*> values) {
    std::string s = std::string(k.name) + " " + step;
    for (const Strided* v : values) s += "; " + describe(*v);
    return s;
}

// ---- the steps

void fuzz_copies(Random& r, const Kernels& k) {
    const Sizes sizes = random_sizes(r);
    const Value x = random_value(r, sizes, true, one_in(r, 4));
    const Strided to = random_strides(r, sizes);
    check_step(named(k, "copy", {&x.at, &to}), to, [&](float* out, Part part) { copy_strided(x.at, x.data(), to, out, part); },
               [&](const Index& i) { return Expected{x(i), 0}; });

    IndexMaps maps;
    Sizes mapped = sizes;
    for (size_t d = 0; d < sizes.size(); ++d) {
        const int64_t kind = pick(r, 0, 6), n = sizes[d];
        if (kind < 2) continue;
        std::vector<int32_t>& map = maps[d];
        const int64_t size = kind == 2 ? n : pick(r, 1, n + 3), shift = pick(r, -3, 3);
        for (int64_t i = 0; i < size; ++i) {
            int64_t from = i + shift;                                      // 3: padded
            if (kind == 2) from = ((i + shift) % n + n) % n;               // rolled
            if (kind == 4) from = pick(r, -1, n - 1);                      // anything
            if (kind == 5) from = i / 2;                                   // repeated
            if (kind == 6) from = std::min(i * 2, n - 1);                  // every second
            map.push_back(static_cast<int32_t>(from < 0 || from >= n ? -1 : from));
        }
        mapped[d] = size;
    }
    const Strided all = random_strides(r, mapped);
    check_step(named(k, "mapped copy", {&x.at, &all}), all,
               [&](float* out, Part part) { copy_mapped(x.at, x.data(), maps, 0.5f, all, out, part); },
               [&](Index i) {
                   for (size_t d = 0; d < sizes.size(); ++d) {
                       if (!maps[d].empty()) i[d] = maps[d][static_cast<size_t>(i[d])];
                       if (i[d] < 0) return Expected{0.5, 0};
                   }
                   return Expected{x(i), 0};
               });
}

double apply(Binary op, double a, double b) {
    if (std::isnan(a) || std::isnan(b)) return static_cast<double>(kNan);
    switch (op) {
        case Binary::add: return a + b;
        case Binary::sub: return a - b;
        case Binary::mul: return a * b;
        case Binary::div: return a / b;
        case Binary::maximum: return std::max(a, b);
        case Binary::minimum: return std::min(a, b);
    }
    return 0;
}

void fuzz_elementwise(Random& r, const Kernels& k) {
    const Sizes sizes = random_sizes(r);
    const Value a = random_value(r, sizes, true, one_in(r, 3)), b = random_value(r, sizes, true, one_in(r, 2));
    const Strided to = random_strides(r, sizes);
    const float *pa = a.data(), *pb = b.data();
    const Binary op = static_cast<Binary>(pick(r, 0, 5));
    const Activation acts[] = {{}, {Act::relu, 0, 0}, {Act::relu6, 0, 0}, {Act::leaky_relu, 0.2f, 0}, {Act::clamp, -1, 0.5f}, {Act::leaky_relu, 1.5f, 0},
                               {Act::hardswish, 0, 0}, {Act::tanh, 0, 0}};
    const Activation act = acts[pick(r, 0, 7)];
    check_step(named(k, "binary", {&a.at, &b.at, &to}), to,
               [&](float* out, Part part) { binary(k, op, a.at, pa, b.at, pb, to, out, act, part); },
               [&](const Index& i) {
                   const double v = static_cast<double>(static_cast<float>(apply(op, a(i), b(i))));  // what the activation is given
                   const double y = act_reference(act, v);
                   return Expected{y, 4 * kEps * std::fabs(y) + (act.kind == Act::hardswish ? 1e-7 * std::fabs(v) : 0) + 1e-44};
               });

    const Activation any = kBounds[pick(r, 0, static_cast<int64_t>(std::size(kBounds)) - 1)].act;
    check_step(named(k, "activate", {&a.at, &to}), to, [&](float* out, Part part) { activate(k, a.at, pa, to, out, any, part); },
               [&](const Index& i) {
                   const float v = static_cast<float>(a(i));
                   float y;
                   k.act_row(&v, &y, 1, any);
                   return Expected{static_cast<double>(y), 0};
               });
    const Value x = random_value(r, sizes, true);  // in place
    float* px = x.data();
    check_step(named(k, "activate in place", {&x.at}), x.at,
               [&](float* out, Part part) {
                   if (part.id == part.count - 1) std::memcpy(out, px, span(x.at) * 4);  // the first to run
                   activate(k, x.at, out, x.at, out, any, part);
                   if (part.id > 0) return;
                   const uint32_t untouched = 0xFFABCDEF;  // the gaps must be as they were, then as check_step wants them
                   std::vector<bool> element(span(x.at));
                   for_indices(sizes, [&](const Index& i) { element[static_cast<size_t>(x.place(i))] = true; });
                   for (size_t i = 0; i < element.size(); ++i)
                       if (!element[i]) {
                           CHECK(std::memcmp(out + i, px + i, 4) == 0);
                           std::memcpy(out + i, &untouched, 4);
                       }
               },
               [&](const Index& i) {
                   const float v = static_cast<float>(x(i));
                   float y;
                   k.act_row(&v, &y, 1, any);
                   return Expected{static_cast<double>(y), 0};
               });

    if (sizes.size() < 2) return;
    std::vector<float> scale(one_in(r, 3) ? 1 : static_cast<size_t>(sizes[1]));
    for (float& s : scale) s = real(r);
    check_step(named(k, "prelu", {&a.at, &to}), to, [&](float* out, Part part) { prelu(k, a.at, pa, scale, to, out, part); },
               [&](const Index& i) {
                   const double v = a(i), s = static_cast<double>(scale[scale.size() == 1 ? 0 : static_cast<size_t>(i[1])]);
                   return Expected{v > 0 ? v : v * s, kEps * std::fabs(v) + 1e-44};
               });
}

void fuzz_reduce(Random& r, const Kernels& k) {
    const Sizes sizes = random_sizes(r, 0, 5);
    const size_t kept = static_cast<size_t>(pick(r, 0, static_cast<int64_t>(sizes.size())));
    const Value x = random_value(r, sizes, one_in(r, 3));
    const Strided to = random_strides(r, Sizes(sizes.begin(), sizes.begin() + static_cast<int64_t>(kept)));
    const Sizes rest(sizes.begin() + static_cast<int64_t>(kept), sizes.end());
    const Reduction kind = static_cast<Reduction>(pick(r, 0, 3));
    float* px = x.data();
    check_step(named(k, "reduce", {&x.at, &to}), to, [&](float* out, Part part) { reduce(k, kind, x.at, px, to, out, part); },
               [&](Index i) {
                   double sum = 0, magnitude = 0, n = 0, most = -static_cast<double>(kInf), least = static_cast<double>(kInf);
                   for_indices(rest, [&](const Index& j) {
                       for (size_t d = 0; d < rest.size(); ++d) i[kept + d] = j[d];
                       const double v = x(i);
                       sum += v;
                       magnitude += std::fabs(v);
                       n += 1;
                       most = v > most || std::isnan(v) ? v : most;
                       least = v < least || std::isnan(v) ? v : least;
                   });
                   if (kind == Reduction::max) return Expected{most, 0};
                   if (kind == Reduction::min) return Expected{least, 0};
                   const double by = kind == Reduction::mean ? n : 1;
                   return Expected{sum / by, (kEps * std::fabs(sum) + 1e-12 * magnitude) / by + 1e-44};
               });
}

// Mean, deviation, largest element and sum of exponentials of the line that an element is on.
struct Line {
    double mean, factor, most, sum;
};
using Lines = std::map<int64_t, Line>;

Line line_of(const std::vector<double>& v, double eps) {
    Line l{0, 0, -static_cast<double>(kInf), 0};
    for (double x : v) l.mean += x / static_cast<double>(v.size());
    for (double x : v) l.factor += (x - l.mean) * (x - l.mean) / static_cast<double>(v.size());
    l.factor = 1 / std::sqrt(l.factor + eps);
    for (double x : v) l.most = x > l.most || std::isnan(x) ? x : l.most;
    for (double x : v) l.sum += std::exp(x - l.most);
    return l;
}

// The number of an index among those of its first dimensions.
int64_t number_of(const Index& i, const Sizes& sizes, int64_t dimensions) {
    int64_t number = 0;
    for (size_t d = 0; d < static_cast<size_t>(dimensions); ++d) number = number * sizes[d] + i[d];
    return number;
}

// By `key` of each index.
Lines lines_of(const Value& x, const std::function<int64_t(const Index&)>& key, double eps) {
    std::map<int64_t, std::vector<double>> values;
    for_indices(sizes_of(x.at), [&](const Index& i) { values[key(i)].push_back(x(i)); });
    Lines lines;
    for (const auto& [k, v] : values) lines[k] = line_of(v, eps);
    return lines;
}

void fuzz_softmax(Random& r, const Kernels& k) {
    const Sizes sizes = random_sizes(r, 1, 5);
    const Value x = random_value(r, sizes, one_in(r, 4));
    const Strided to = random_strides(r, sizes);
    float* px = x.data();
    if (one_in(r, 2))
        for (size_t i = 0; i < x.buffer->size(); ++i) px[i] *= 30;
    const auto key = [&](const Index& i) { return number_of(i, sizes, static_cast<int64_t>(sizes.size()) - 1); };
    const Lines lines = lines_of(x, key, 0);
    check_step(named(k, "softmax", {&x.at, &to}), to, [&](float* out, Part part) { softmax(k, x.at, px, to, out, part); },
               [&](const Index& i) {
                   const Line& l = lines.at(key(i));
                   const double y = std::exp(x(i) - l.most) / l.sum;
                   return Expected{y, y > 0 ? (6 + std::fabs(x(i) - l.most)) * kEps * y + 0x1p-140 : 0x1p-140};
               });
}

void fuzz_norms(Random& r, const Kernels& k) {
    const bool grouped = one_in(r, 2);
    const Sizes sizes = random_sizes(r, grouped ? 2 : 1, 5);
    const Value x = random_value(r, sizes, one_in(r, 6));
    const Strided to = random_strides(r, sizes);
    float* px = x.data();
    if (one_in(r, 4))
        for (size_t i = 0; i < x.buffer->size(); ++i) px[i] += 50;
    const double eps = 1e-5;
    int64_t groups = 1;
    if (grouped) {
        groups = pick(r, 1, sizes[1]);
        while (sizes[1] % groups != 0) --groups;
    }
    const int64_t kept = grouped ? 1 : pick(r, 0, static_cast<int64_t>(sizes.size()) - 1);
    const auto key = [&](const Index& i) {
        const int64_t line = number_of(i, sizes, kept);
        return grouped ? line * groups + i[1] / (sizes[1] / groups) : line;
    };
    const Lines lines = lines_of(x, key, eps);
    int64_t params = 1;  // elements of scale and bias
    for (size_t d = static_cast<size_t>(kept); d < (grouped ? 2 : sizes.size()); ++d) params *= sizes[d];
    std::vector<float> scale(static_cast<size_t>(params)), bias(scale.size());
    for (float& v : scale) v = real(r);
    for (float& v : bias) v = real(r);
    const float* ps = one_in(r, 3) ? nullptr : scale.data();
    const float* pb = one_in(r, 3) ? nullptr : bias.data();
    const auto run = [&](float* out, Part part) {
        if (grouped) group_norm(k, groups, eps, ps, pb, x.at, px, to, out, part);
        else layer_norm(k, static_cast<int>(sizes.size()) - static_cast<int>(kept), eps, ps, pb, x.at, px, to, out, part);
    };
    check_step(named(k, grouped ? "group_norm" : "layer_norm", {&x.at, &to}), to, run, [&](const Index& i) {
        int64_t at = 0;
        for (size_t d = static_cast<size_t>(kept); d < (grouped ? 2 : sizes.size()); ++d) at = at * sizes[d] + i[d];
        const double s = ps ? static_cast<double>(ps[at]) : 1, b = pb ? static_cast<double>(pb[at]) : 0;
        const Line& l = lines.at(key(i));
        const double y = (x(i) - l.mean) * l.factor * s;
        const double rounding = 3 * std::fabs(y) + std::fabs(b) + (std::fabs(l.mean) + std::fabs(x(i))) * l.factor * std::fabs(s);
        return Expected{y + b, kEps * rounding + 1e-37};
    });
}

void fuzz_matmul(Random& r, const Kernels& k) {
    const int64_t some[] = {1, 1, 2, 3, 5, 6, 7, 12, 16, 17, 31, 48, 49, 64, 65, 100, 130};
    int64_t m = some[pick(r, 0, 16)], n = some[pick(r, 0, 16)], depth = one_in(r, 12) ? pick(r, 500, 1100) : some[pick(r, 0, 16)];
    Sizes leading = random_sizes(r, 0, 3);
    for (int64_t& s : leading) s = std::min<int64_t>(s, r.small() ? 2 : 3);
    while (r.small() && m * n * depth > 1 << 13) {  // the largest is halved, so that each is large with small others
        int64_t& largest = m > n && m > depth ? m : n > depth ? n : depth;
        largest /= 2;
    }
    const auto with = [&](int64_t rows, int64_t cols) {
        Sizes s = leading;
        s.push_back(rows);
        s.push_back(cols);
        return s;
    };
    Value a = random_value(r, with(m, depth), one_in(r, 8)), b = random_value(r, with(depth, n), one_in(r, 8));
    for (Strided* s : {&a.at, &b.at})
        for (size_t d = 0; d < leading.size(); ++d)
            if (one_in(r, 4)) s->stride[d] = 0;
    if (one_in(r, 4)) {  // rows of b lie together: dot products
        b.at.stride[leading.size()] = 1;
        b.at.stride[leading.size() + 1] = depth;
        b.at.offset = 0;
        for (size_t d = 0; d < leading.size(); ++d) b.at.stride[d] = 0;
    }
    const Strided to = random_strides(r, with(m, n));
    const float *pa = a.data(), *pb = b.data();
    const size_t row = leading.size(), col = row + 1;
    check_step(named(k, "matmul", {&a.at, &b.at, &to}), to,
               [&](float* out, Part part) {
                   Guarded scratch(static_cast<size_t>(matmul_scratch(a.at, b.at)));
                   std::memset(scratch.data(), 0xFF, scratch.size() * 4);
                   matmul(k, a.at, pa, b.at, pb, to, out, scratch.data(), part);
               },
               [&](const Index& i) {
                   double sum = 0, magnitude = 0;
                   Index ia = i, ib = i;
                   for (int64_t j = 0; j < depth; ++j) {
                       ia[col] = ib[row] = j;
                       sum += a(ia) * b(ib);
                       magnitude += std::fabs(a(ia) * b(ib));
                   }
                   return Expected{sum, static_cast<double>(depth + 4) * kEps * magnitude + 1e-37};
               });
}

void fuzz_resize(Random& r, const Kernels& k) {
    const int64_t some[] = {1, 2, 3, 5, 7, 8, 14, 16, 17, 33};
    const Sizes in{pick(r, 1, 2), pick(r, 1, 3), some[pick(r, 0, 9)], some[pick(r, 0, 9)]};
    int64_t height = some[pick(r, 0, 9)], width = one_in(r, 20) ? pick(r, 1000, 2100) : some[pick(r, 0, 9)];
    while (r.small() && in[0] * in[1] * height * width > 2200 && height > 1) height /= 2;
    const double scale_h = one_in(r, 2) ? 0 : static_cast<double>(height) / static_cast<double>(in[2]) * 1.01, scale_w = one_in(r, 2) ? 0 : 1.7;
    const bool corners = one_in(r, 2);
    const Bilinear axes = bilinear_axes(in[2], in[3], height, width, scale_h, scale_w, corners);
    const auto check_axis = [&](const Bilinear::Axis& axis, int64_t size, int64_t out, double scale) {
        for (int64_t i = 0; i < out; ++i) {
            const double at = static_cast<double>(i), n = static_cast<double>(size);
            double source = (at + 0.5) * (scale > 0 ? 1 / scale : n / static_cast<double>(out)) - 0.5;
            if (corners) source = out > 1 ? at * (n - 1) / static_cast<double>(out - 1) : 0;
            if (size == out) source = at;
            source = std::clamp(source, 0.0, n - 1);
            const size_t j = static_cast<size_t>(i);
            const double got = axis.low[j] + static_cast<double>(axis.weight[j]) * (axis.high[j] - axis.low[j]);
            CHECK(axis.low[j] >= 0 && axis.high[j] < size && axis.high[j] - axis.low[j] <= 1 && axis.high[j] >= axis.low[j]);
            CHECK(std::fabs(got - source) < 1e-5 * n);
        }
    };
    check_axis(axes.y, in[2], height, scale_h);
    check_axis(axes.x, in[3], width, scale_w);
    const Value x = random_value(r, in, one_in(r, 6));
    float* px = x.data();
    const Strided to = random_strides(r, {in[0], in[1], height, width});
    check_step(named(k, "resize", {&x.at, &to}), to, [&](float* out, Part part) { resize_bilinear(k, axes, x.at, px, to, out, part); },
               [&](const Index& i) {
                   const size_t iy = static_cast<size_t>(i[2]), ix = static_cast<size_t>(i[3]);
                   const double wy = static_cast<double>(axes.y.weight[iy]), wx = static_cast<double>(axes.x.weight[ix]);
                   const auto pixel = [&](int32_t y, int32_t xx) { return x({i[0], i[1], y, xx}); };
                   const auto line = [&](int32_t y) { return pixel(y, axes.x.low[ix]) * (1 - wx) + pixel(y, axes.x.high[ix]) * wx; };
                   return Expected{line(axes.y.low[iy]) * (1 - wy) + line(axes.y.high[iy]) * wy, 12 * kEps};
               });
}

}  // namespace

void test_activations(const std::string& isa) {
    const std::vector<float> x = sweep();
    for (const Bound& b : kBounds) check_activation(kernels_for(isa), b, x);
}

void fuzz_tensor(const std::string& isa, int cases) {
    const Kernels& k = kernels_for(isa);
    for (int i = 0; i < cases; ++i) {
        Random random(static_cast<unsigned>(i));
        guard_before() = i % 3 == 2;
        fuzz_copies(random, k);
        fuzz_elementwise(random, k);
        fuzz_reduce(random, k);
        fuzz_softmax(random, k);
        fuzz_norms(random, k);
        fuzz_matmul(random, k);
        fuzz_resize(random, k);
    }
}

void fuzz_tensor_step(const std::string& isa, Random& random) {
    const Kernels& k = kernels_for(isa);
    guard_before() = pick(random, 0, 1) != 0;
    switch (pick(random, 0, 6)) {
        case 0: return fuzz_copies(random, k);
        case 1: return fuzz_elementwise(random, k);
        case 2: return fuzz_reduce(random, k);
        case 3: return fuzz_softmax(random, k);
        case 4: return fuzz_norms(random, k);
        case 5: return fuzz_matmul(random, k);
        default: return fuzz_resize(random, k);
    }
}
