// The CUDA kernels' own source, on the host: packing, fragment order, tiles, borders and epilogues against plain loops.
#include <cfloat>
#include <cstdio>

#include "check.h"
#include "cuda/driver.h"
#include "cuda/pack.h"
#include "errors.h"
#include "cuda_emulator.h"

using namespace sparseprune;
using namespace sparseprune::cuda;

namespace {

// A random convolution, its tensors as float32 values of the storage type, and what double arithmetic makes of them.
struct Case {
    Layer layer;
    std::vector<float> weight, x, bias, residual;  // x (N, C, H, W); residual as the output, (N, OC, OH, OW)
    Epilogue epilogue;
    std::vector<double> expected, magnitude;
    std::vector<int> kept;
};

template <class T>
float rounded(float x) { return to_float(from_float<T>(x)); }

// Blocks of `rows` x `columns` input channels of one tap are kept whole.
template <class T>
Case random_case(Random& r, int rows, int columns, bool linear, bool grouped) {
    Case c;
    const int64_t groups = grouped && one_in(r, 3) ? 2 : 1;
    Layer& l = c.layer = {};
    l.groups = groups;
    l.c = groups * pick(r, 1, 5) * (columns > 1 || !grouped ? 8 : pick(r, 1, 5));
    l.out_c = groups * pick(r, 1, 40);
    l.n = linear ? 1 : pick(r, 1, 3);
    l.kh = l.kw = l.stride_h = l.stride_w = l.dil_h = l.dil_w = 1;
    l.h = linear ? 1 : pick(r, 1, 9), l.w = linear ? pick(r, 1, 150) : pick(r, 1, 12);
    if (!linear) {
        l.kh = pick(r, 1, 3), l.kw = pick(r, 1, 3), l.stride_h = pick(r, 1, 3), l.stride_w = pick(r, 1, 3);
        l.pad_h = pick(r, 0, 3), l.pad_w = pick(r, 0, 3), l.dil_h = pick(r, 1, 2), l.dil_w = pick(r, 1, 2);
        l.h = std::max(l.h, l.dil_h * (l.kh - 1) + 1 - 2 * l.pad_h), l.w = std::max(l.w, l.dil_w * (l.kw - 1) + 1 - 2 * l.pad_w);
    }
    const Geometry g = geometry(l, 32);
    const int64_t in = l.c / groups, taps = l.kh * l.kw;
    const double density = one_in(r, 8) ? 0.0 : one_in(r, 8) ? 1.0 : static_cast<double>(pick(r, 1, 9)) / 10;
    c.weight.assign(static_cast<size_t>(l.out_c * in * taps), 0.0f);
    std::bernoulli_distribution keep(density);
    for (int64_t row = 0; row < l.out_c; row += rows)
        for (int64_t channel = 0; channel < in; channel += columns)
            for (int64_t tap = 0; tap < taps; ++tap)
                if (keep(r))
                    for (int64_t i = row; i < std::min(row + rows, l.out_c); ++i)
                        for (int64_t j = channel; j < std::min(channel + columns, in); ++j)
                            c.weight[static_cast<size_t>((i * in + j) * taps + tap)] = rounded<T>(real(r));
    const auto fill_in = [&](std::vector<float>& v, int64_t size) {
        for (int64_t i = 0; i < size; ++i) v.push_back(rounded<T>(real(r)));
    };
    fill_in(c.x, l.n * l.c * l.h * l.w);
    const int64_t outputs = l.out_c * g.pixels;
    if (one_in(r, 2)) fill_in(c.bias, l.out_c);
    if (one_in(r, 2)) fill_in(c.residual, outputs);
    c.epilogue.act = static_cast<int>(pick(r, 0, 3));
    c.epilogue.low = c.epilogue.act == 2 ? 0.25f : -0.5f, c.epilogue.high = 0.75f;

    for (int64_t n = 0; n < l.n; ++n)
        for (int64_t o = 0; o < l.out_c; ++o)
            for (int64_t y = 0; y < g.oh; ++y)
                for (int64_t xo = 0; xo < g.ow; ++xo) {
                    double sum = 0, magnitude = 0;
                    int kept = 0;
                    const auto add = [&](double v) { sum += v, magnitude += std::fabs(v); };
                    for (int64_t ch = 0; ch < in; ++ch)
                        for (int64_t tap = 0; tap < taps; ++tap) {
                            const double w = c.weight[static_cast<size_t>((o * in + ch) * taps + tap)];
                            const int64_t iy = y * l.stride_h - l.pad_h + tap / l.kw * l.dil_h, ix = xo * l.stride_w - l.pad_w + tap % l.kw * l.dil_w;
                            kept += w != 0;
                            if (w != 0 && iy >= 0 && iy < l.h && ix >= 0 && ix < l.w)
                                add(w * static_cast<double>(c.x[static_cast<size_t>(((n * l.c + o / (l.out_c / groups) * in + ch) * l.h + iy) * l.w + ix)]));
                        }
                    if (!c.bias.empty()) add(static_cast<double>(c.bias[static_cast<size_t>(o)]));
                    if (!c.residual.empty()) add(static_cast<double>(c.residual[c.expected.size()]));
                    const double low = static_cast<double>(c.epilogue.low), high = static_cast<double>(c.epilogue.high);
                    const int act = c.epilogue.act;
                    c.expected.push_back(act == 1 ? std::max(sum, 0.0) : act == 2 ? (sum > 0 ? sum : low * sum) : act == 3 ? std::clamp(sum, low, high) : sum);
                    c.magnitude.push_back(magnitude);
                    c.kept.push_back(kept);
                }
    return c;
}

// A tensor (n, c, pixels) of T, as it lies or with its channels last.
template <class T>
struct Array {
    std::vector<T> data;
    Strides strides;
    bool last;
    int64_t c, pixels;

    Array(const std::vector<float>& from, int64_t n, int64_t channels, int64_t plane, bool channels_last)
        : data(static_cast<size_t>(n * channels * plane)), last(channels_last), c(channels), pixels(plane) {
        strides = last ? Strides{c * plane, 1, c} : Strides{c * plane, plane, 1};
        for (size_t i = 0; i < data.size(); ++i) data[place(i)] = from.empty() ? from_float<T>(NAN) : from_float<T>(from[i]);
    }
    size_t place(size_t i) const {  // of element i in (n, c, pixel) order
        const auto index = static_cast<int64_t>(i), n = index / (c * pixels), channel = index / pixels % c, p = index % pixels;
        return static_cast<size_t>(n * strides.n + channel * strides.c + p * strides.pixel);
    }
};

template <class T>
void compare(const Case& c, const Array<T>& y, double each, const char* what) {
    const double out = sizeof(T) == 4 ? 0 : std::is_same_v<T, Half> ? 0x1p-11 : 0x1p-8;
    for (size_t i = 0; i < c.expected.size(); ++i) {
        const double found = static_cast<double>(to_float(y.data[y.place(i)]));
        const double bound = ((c.kept[i] + 4) * 0x1p-23 + each) * c.magnitude[i] + out * std::fabs(c.expected[i]) + 0x1p-24;
        if (std::fabs(found - c.expected[i]) <= bound) continue;
        const Layer& l = c.layer;
        check_failed(__FILE__, __LINE__, message(what, ": output ", i, " is ", found, ", expected ", c.expected[i], " +- ", bound, "; n", l.n, " c", l.c,
            " ", l.h, "x", l.w, " out ", l.out_c, " kernel ", l.kh, "x", l.kw, " stride ", l.stride_h, l.stride_w, " pad ", l.pad_h, l.pad_w, " dil ",
            l.dil_h, l.dil_w, " groups ", l.groups));
        return;
    }
}

Csr csr_of(const Case& c) {
    return to_csr(BlockCSR::from_dense(c.weight.data(), nullptr, {c.layer.out_c, static_cast<int64_t>(c.weight.size()) / c.layer.out_c}, 1, 1));
}

template <class Args, class T>
void set_tensors(Args& args, const Case& c, const Array<T>& x, Array<T>& y, const Array<T>& residual, std::vector<T>& bias) {
    for (const float b : c.bias) bias.push_back(from_float<T>(b));
    args.epilogue = c.epilogue;
    if (!c.bias.empty()) args.epilogue.bias = bias.data();
    if (!c.residual.empty()) args.epilogue.residual = residual.data.data();
    args.x = x.data.data(), args.y = y.data.data();
}

template <class T, int V, int TILE>
void spmm_case(Random& r) {
    const bool linear = one_in(r, 4);
    const Case c = random_case<T>(r, V, 1, linear, true);
    const Geometry g = geometry(c.layer, 32 * TILE);
    const bool last = linear || one_in(r, 3);
    const int64_t plane = int64_t{g.oh} * g.ow;
    const Array<T> x(c.x, g.n, g.c, int64_t{g.h} * g.w, last), residual(c.residual.empty() ? c.x : c.residual, g.n, c.residual.empty() ? g.c : g.out_c, c.residual.empty() ? int64_t{g.h} * g.w : plane, last);
    Array<T> y({}, g.n, g.out_c, plane, last);
    const int chunk = std::max(1, spmm_chunk(g, sizeof(T), pick(r, 1, 4) * 2 * (int64_t{g.span} * (pick(r, 2, 9)) * static_cast<int64_t>(sizeof(T)))));
    const PackedSpmm packed = pack_spmm(csr_of(c), g, V, chunk);
    SpmmArgs args{};
    std::vector<T> bias;
    set_tensors(args, c, x, y, residual, bias);
    args.g = g, args.in = x.strides, args.out = y.strides;
    args.records = packed.records.data(), args.starts = packed.starts.data(), args.counts = packed.counts.data(), args.order = packed.order.data();
    args.chunk = packed.chunk, args.chunks = packed.chunks, args.tiles = packed.tiles;
    const int warps = one_in(r, 6) ? 8 : 2;
    emulator::launch(ceil_div(g.pixels, 32 * TILE), packed.tiles / warps, 32 * warps, static_cast<size_t>(2 * spmm_buffer(g.span, chunk)) * sizeof(T), r,
                     [&](emulator::Context& ctx) { spmm_body<T, V, TILE>(ctx, args); });
    compare(c, y, 0, "spmm");
}

template <class T, int N>
void gemv_case(Random& r) {
    Case c = random_case<T>(r, 1, 1, true, false);
    while (c.layer.w > N) c = random_case<T>(r, 1, 1, true, false);
    const Geometry g = geometry(c.layer, 32);
    const Array<T> x(c.x, 1, g.c, g.w, true), residual(c.residual.empty() ? c.x : c.residual, 1, c.residual.empty() ? g.c : g.out_c, g.w, true);
    Array<T> y({}, 1, g.out_c, g.w, true);
    const Math math = sizeof(T) == 4 ? Math::tf32 : std::is_same_v<T, Half> ? Math::half : Math::bfloat;
    const PackedGemv packed = pack_gemv(csr_of(c), g.c, math);
    std::vector<T> values(packed.values.size() / sizeof(T) + 4);
    if (!packed.values.empty()) memcpy(values.data(), packed.values.data(), packed.values.size());
    void* at = nullptr;  // as cudaMalloc aligns
    if (posix_memalign(&at, 256, (values.size() + packed.columns.size()) * 4 + 512) != 0) return;
    char* memory = static_cast<char*>(at);
    memcpy(memory, values.data(), values.size() * sizeof(T));
    char* columns = memory + (values.size() * sizeof(T) + 255) / 256 * 256;
    if (!packed.columns.empty()) memcpy(columns, packed.columns.data(), packed.columns.size() * 2);
    GemvArgs args{};
    std::vector<T> bias;
    set_tensors(args, c, x, y, residual, bias);
    args.columns = reinterpret_cast<const uint16_t*>(columns), args.values = memory, args.starts = packed.starts.data(), args.order = packed.order.data();
    args.n = g.w, args.k = g.c, args.rows = g.out_c;
    emulator::launch(static_cast<int>(pick(r, 1, 4)), 1, static_cast<int>(32 * pick(r, 1, 4)), static_cast<size_t>(g.c + 1) * N * 4, r,
                     [&](emulator::Context& ctx) { gemv_body<T, N>(ctx, args); });
    compare(c, y, 0, "gemv");
    free(at);
}

template <Math M, int R, bool VECTORS>
void blocks_case(Random& r) {
    using T = typename Element<M>::type;
    const bool linear = one_in(r, 4);
    Case c = random_case<T>(r, R, VECTORS ? 1 : 16, linear, false);
    const Geometry g = geometry(c.layer, kStrip);
    const bool last = one_in(r, 2);
    const int64_t plane = int64_t{g.oh} * g.ow;
    const Array<T> x(c.x, g.n, g.c, int64_t{g.h} * g.w, true), residual(c.residual.empty() ? c.x : c.residual, g.n, c.residual.empty() ? g.c : g.out_c, c.residual.empty() ? int64_t{g.h} * g.w : plane, c.residual.empty() || last);
    Array<T> y({}, g.n, g.out_c, plane, last);
    const int chunk = blocks_chunk(g, sizeof(T), kMostTaps * 4 + 2 * int64_t{g.span} * (pick(r, 1, 3) * 16 * static_cast<int64_t>(sizeof(T)) + kPadBytes));
    CHECK(chunk >= 16);
    const PackedBlocks packed = pack_blocks(csr_of(c), g, M, R, VECTORS, chunk);
    std::vector<Words4> weights(packed.weights.size() / 4 + 1);
    if (!packed.weights.empty()) memcpy(weights.data(), packed.weights.data(), packed.weights.size() * 4);
    BlocksArgs args{};
    std::vector<T> bias;
    set_tensors(args, c, x, y, residual, bias);
    args.g = g, args.in = x.strides, args.out = y.strides;
    args.weights = weights[0].w, args.columns = packed.columns.data(), args.starts = packed.starts.data(), args.order = packed.order.data();
    args.chunk = packed.chunk, args.chunks = packed.chunks, args.row_groups = packed.row_groups;
    const int warps = one_in(r, 6) ? 8 : 1;
    emulator::launch(ceil_div(g.pixels, kStrip), packed.row_groups * R / kWarpRows / warps, 32 * warps,
                     static_cast<size_t>(blocks_shared(g.span, chunk, sizeof(T))), r, [&](emulator::Context& ctx) { blocks_body<M, R, VECTORS>(ctx, args); });
    // TF32 rounds each operand to 11 bits; the three products leave out that of the small parts, and round the small parts.
    compare(c, y, M == Math::tf32 ? 0x1p-10 : M == Math::tf32x3 ? 0x1p-20 : 0, VECTORS ? "vectors" : "blocks");
}

template <Math M>
void blocks_cases(Random& r) {
    blocks_case<M, 16, false>(r), blocks_case<M, 32, false>(r);
    blocks_case<M, 8, true>(r), blocks_case<M, 16, true>(r), blocks_case<M, 32, true>(r);
}

template <class T>
void core_cases(Random& r) {
    spmm_case<T, 1, 1>(r), spmm_case<T, 1, 4>(r), spmm_case<T, 4, 1>(r), spmm_case<T, 4, 4>(r);
    gemv_case<T, 1>(r), gemv_case<T, 2>(r), gemv_case<T, 4>(r);
}

void test_numbers() {
    for (uint32_t b = 0; b < 65536; ++b) {  // every 16-bit number survives the way there and back
        const auto bits = static_cast<uint16_t>(b);
        const float h = to_float(Half{bits}), f = to_float(BFloat{bits});
        CHECK(std::isnan(h) ? std::isnan(to_float(from_float<Half>(h))) : from_float<Half>(h).bits == bits);
        CHECK(std::isnan(f) ? std::isnan(to_float(from_float<BFloat>(f))) : from_float<BFloat>(f).bits == bits);
    }
    CHECK(from_float<Half>(1 + 0x1p-11f).bits == 0x3c00 && from_float<Half>(1 + 0x1.8p-10f).bits == 0x3c02);  // ties to even
    CHECK(from_float<Half>(65519.0f).bits == 0x7bff && from_float<Half>(65520.0f).bits == 0x7c00);
    CHECK(from_float<Half>(0x1p-25f).bits == 0 && from_float<Half>(0x1.8p-25f).bits == 1 && from_float<Half>(-0x1p-24f).bits == 0x8001);
    CHECK(from_float<BFloat>(1 + 0x1p-8f).bits == 0x3f80 && from_float<BFloat>(1 + 0x1.8p-7f).bits == 0x3f82);
    CHECK(to_tf32(bits_as<uint32_t>(1 + 0x1p-11f)) == bits_as<uint32_t>(1 + 0x1p-10f));
}

void test_errors() {
    Layer l{1, 4, 5, 5, 4, 3, 3, 1, 1, 1, 1, 1, 1, 3};
    CHECK_THROWS(geometry(l, 32), ValueError, "groups=3");
    l.groups = 1, l.stride_h = 0;
    CHECK_THROWS(geometry(l, 32), ValueError, "stride=0");
    l.stride_h = 1, l.h = 1, l.pad_h = 0;
    CHECK_THROWS(geometry(l, 32), ValueError, "H=1");
    l.h = 1 << 20, l.w = 1 << 20;
    CHECK_THROWS(geometry(l, 32), ValueError, "padded plane");
    CHECK_THROWS(pack_gemv({{0}, {}, {}}, 65536, Math::half), ValueError, "columns=65536");
    const Geometry g = geometry({1, 6, 5, 5, 4, 3, 3, 1, 1, 1, 1, 1, 1, 1}, kStrip);
    CHECK(blocks_chunk(g, 4, 1 << 20) == 0);  // 24 bytes of channels: no whole 16
    CHECK(spmm_chunk(g, 4, 16) == 0);
}

void test_driver() {
    CHECK(driver_problem(13000, 13000).empty() && driver_problem(12040, 12090).empty() && driver_problem(13000, 12090).empty());
    CHECK(driver_problem(0, 13000).find("no CUDA driver") == 0);
    CHECK(driver_problem(12080, 13000).find("too old: it supports CUDA 12.8, this extension was built with CUDA 13.0") != std::string::npos);
}

void test_fill() {
    std::vector<float> w(32 * 16 * 9, 0.0f);
    for (int row = 0; row < 16; ++row)
        for (int c = 0; c < 16; ++c) w[static_cast<size_t>((row * 16 + c) * 9 + 4)] = 1;
    const Csr csr = to_csr(BlockCSR::from_dense(w.data(), nullptr, {32, 144}, 1, 1));
    CHECK(fill(csr, 16, 9, 16, 16) == 1.0 && fill(csr, 16, 9, 32, 16) == 0.5 && fill(csr, 16, 9, 8, 1) == 1.0 && fill(csr, 16, 9, 32, 32) == 0.5);
}

}  // namespace

void test_cuda(int cases) {
    Random r(6);
    test_numbers();
    test_errors();
    test_driver();
    test_fill();
    for (int i = 0; i < cases; ++i) {
        core_cases<float>(r), core_cases<Half>(r), core_cases<BFloat>(r);
        blocks_cases<Math::half>(r), blocks_cases<Math::bfloat>(r), blocks_cases<Math::tf32>(r), blocks_cases<Math::tf32x3>(r);
    }
    std::printf("CUDA kernels, emulated: %d random layers on each of 41\n", cases);
}
