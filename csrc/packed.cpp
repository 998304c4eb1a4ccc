#include "packed.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstring>

namespace sparseprune {
namespace {

int32_t bits_of(float value) {
    int32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// Makes the number of entries from `begin` on a multiple of `unroll`: a kernel's loop has no rest then, whose length the processor
// could not foresee. The largest weight is cut into equal or half as large parts, so that nothing but kept weights is multiplied.
void fill_up(std::vector<Entry>& entries, size_t begin, int unroll) {
    const size_t count = entries.size() - begin, more = (static_cast<size_t>(unroll) - count % static_cast<size_t>(unroll)) % static_cast<size_t>(unroll);
    if (count == 0 || more == 0) return;
    const auto smaller = [](const Entry& a, const Entry& b) { return std::fabs(a.value) < std::fabs(b.value); };
    const size_t at = static_cast<size_t>(std::max_element(entries.begin() + static_cast<int64_t>(begin), entries.end(), smaller) - entries.begin());
    for (size_t i = 0; i < more; ++i) {
        Entry& cut = i == 2 ? entries[entries.size() - 2] : entries[at];  // halves; a half and quarters; quarters
        cut.value *= 0.5f;
        entries.push_back(cut);
    }
}

void pack_single(PackedWeight& out, const Csr& csr, int64_t rows_per_group, const std::vector<Column>& columns, int64_t cols, int unroll) {
    out.shifts = {0};
    for (const Column& c : columns)  // at most 31 different ones
        if (std::find(out.shifts.begin(), out.shifts.end(), c.shift) == out.shifts.end()) out.shifts.push_back(c.shift);
    const int64_t rows = static_cast<int64_t>(csr.row_start.size()) - 1;
    out.entries.reserve(csr.value.size());
    out.start.push_back(0);
    for (int64_t r = 0; r < rows; ++r) {
        const Column* column = columns.data() + r / rows_per_group * cols;
        for (const int32_t shift : out.shifts) {
            for (int64_t i = csr.row_start[r]; i < csr.row_start[r + 1]; ++i)
                if (column[csr.col[i]].shift == shift) out.entries.push_back({column[csr.col[i]].offset, csr.value[i]});
            fill_up(out.entries, static_cast<size_t>(out.start.back()), unroll);
            out.start.push_back(static_cast<int64_t>(out.entries.size()));
        }
        out.cuts.push_back(r);
        out.cost.push_back(csr.row_start[r]);
    }
}

// Six bytes an entry instead of eight, where every input is a cache line of one window: large layers stream their weights.
void narrow(PackedWeight& out, const std::vector<Column>& columns) {
    int32_t low = INT32_MAX, high = INT32_MIN;
    for (const Column& c : columns) {
        low = std::min(low, c.offset);
        high = std::max(high, c.offset);
    }
    if ((static_cast<int64_t>(high) - low) / kLanes > UINT16_MAX) return;
    for (const Column& c : columns)
        if ((c.offset - low) % kLanes != 0) return;
    out.narrow_base = low;
    out.narrow.reserve(out.entries.size());
    for (const Entry& e : out.entries) out.narrow.push_back({e.value, static_cast<uint16_t>((e.offset - low) / kLanes)});
    out.entries = {};
}

struct Kept {
    int32_t offset;
    int row;
    float value;
};

// The columns of up to four rows, sorted by offset, then written mask by mask.
void pack_four(PackedWeight& out, std::vector<Kept>& kept) {
    std::stable_sort(kept.begin(), kept.end(), [](const Kept& a, const Kept& b) { return a.offset < b.offset; });
    struct Col {
        int mask;
        size_t first;
    };
    std::vector<Col> cols;
    for (size_t i = 0; i < kept.size(); ++i) {
        // a row has a column at most once; equal offsets of two rows are one column
        const int bit = 1 << kept[i].row;
        if (!cols.empty() && kept[cols.back().first].offset == kept[i].offset && !(cols.back().mask & bit)) {
            cols.back().mask |= bit;
        } else {
            cols.push_back({bit, i});
        }
    }
    for (int mask = 1; mask < 16; ++mask) {
        const auto has = [&](const Col& c) { return c.mask == mask; };
        const int32_t count = static_cast<int32_t>(std::count_if(cols.begin(), cols.end(), has));
        if (count == 0) continue;
        out.stream.push_back(count << 4 | mask);
        for (const Col& c : cols) {
            if (!has(c)) continue;
            out.stream.push_back(kept[c.first].offset);
            for (int i = 0; i < __builtin_popcount(static_cast<unsigned>(mask)); ++i)
                out.stream.push_back(bits_of(kept[c.first + static_cast<size_t>(i)].value));
        }
    }
    out.stream.push_back(0);
}

void pack_masked(PackedWeight& out, const Csr& csr, int64_t rows_per_group, const std::vector<Column>& columns, int64_t cols, int64_t block) {
    const int64_t rows = static_cast<int64_t>(csr.row_start.size()) - 1;
    out.blocks = std::max<int64_t>(1, (cols + block / 2) / block);
    std::vector<int64_t> next(csr.row_start.begin(), csr.row_start.end() - 1);  // of each row
    for (int64_t b = 0; b < out.blocks; ++b) {
        const int64_t end = cols * (b + 1) / out.blocks;
        for (int64_t r0 = 0; r0 < rows; r0 += 4) {
            std::vector<Kept> kept;
            for (int64_t r = r0; r < std::min(rows, r0 + 4); ++r)
                for (int64_t& i = next[r]; i < csr.row_start[r + 1] && csr.col[i] < end; ++i)
                    kept.push_back({columns[r / rows_per_group * cols + csr.col[i]].offset, static_cast<int>(r - r0), csr.value[i]});
            out.start.push_back(static_cast<int64_t>(out.stream.size()));
            pack_four(out, kept);
        }
    }
    for (int64_t r0 = 0; r0 < rows; r0 += 4) {
        out.cuts.push_back(r0);
        out.cost.push_back(csr.row_start[r0]);
    }
}

void pack_dense(PackedWeight& out, const Csr& csr, int64_t groups, int64_t rows_per_group, const std::vector<Column>& columns,
                int64_t cols, int32_t block_rows) {
    const int64_t blocks = (rows_per_group + block_rows - 1) / block_rows;
    out.dense.assign(static_cast<size_t>(groups * blocks * cols * block_rows), 0.0f);
    out.dense_rows_per_group = rows_per_group;
    out.dense_group_offset = groups > 1 ? columns[cols].offset - columns[0].offset : 0;
    for (int64_t k = 0; k < cols; ++k) out.dense_offsets.push_back(columns[k].offset);
    for (int64_t r = 0; r < groups * rows_per_group; ++r) {
        const int64_t in_group = r % rows_per_group, block = r / rows_per_group * blocks + in_group / block_rows;
        float* to = out.dense.data() + block * cols * block_rows + in_group % block_rows;
        for (int64_t i = csr.row_start[r]; i < csr.row_start[r + 1]; ++i) to[csr.col[i] * block_rows] = csr.value[i];
        if (in_group % block_rows == 0) {
            out.cuts.push_back(r);
            out.cost.push_back(r);
        }
    }
}

}  // namespace

int64_t PackedWeight::bytes() const {
    return static_cast<int64_t>(start.size() * 8 + entries.size() * sizeof(Entry) + narrow.size() * sizeof(NarrowEntry) + stream.size() * 4 + dense.size() * 4);
}

Csr weight_csr(const Weight& weight) {
    if (weight.sparse) return to_csr(*weight.sparse);
    Csr csr;
    const int64_t rows = weight.rows(), cols = weight.cols();
    csr.value = *weight.dense;
    csr.col.resize(csr.value.size());
    for (int64_t r = 0; r <= rows; ++r) csr.row_start.push_back(r * cols);
    for (size_t i = 0; i < csr.col.size(); ++i) csr.col[i] = static_cast<int32_t>(static_cast<int64_t>(i) % cols);
    return csr;
}

PackedWeight pack_weight(WeightKind kind, const Weight& weight, int64_t groups, const std::vector<Column>& columns,
                         int32_t dense_block_rows, int unroll, int64_t block) {
    PackedWeight out;
    out.kind = kind;
    const Csr csr = weight_csr(weight);
    const int64_t rows = weight.rows(), cols = weight.cols(), rows_per_group = rows / groups;
    switch (kind) {
        case WeightKind::single:
            pack_single(out, csr, rows_per_group, columns, cols, unroll);
            narrow(out, columns);
            break;
        case WeightKind::masked: pack_masked(out, csr, rows_per_group, columns, cols, block); break;
        case WeightKind::dense: pack_dense(out, csr, groups, rows_per_group, columns, cols, dense_block_rows); break;
    }
    out.cuts.push_back(rows);
    out.cost.push_back(kind == WeightKind::dense ? rows : csr.row_start[rows]);
    return out;
}

namespace {

// Measured (bench/layers.py): gathering sixteen inputs takes as long as reading this many dense weights, from the cache or beyond.
bool dense_is_faster(const Weight& w) {
    const double total = static_cast<double>(w.rows() * w.cols()), density = static_cast<double>(w.sparse->kept()) / total;
    constexpr double kCached = 1 << 20;  // weights
    return density > (total <= kCached ? 0.28 : 0.45);
}

}  // namespace

int64_t DotWeight::bytes() const {
    return static_cast<int64_t>(start.size() * 8 + col16.size() * 2 + col32.size() * 4 + value.size() * 4);
}

DotWeight pack_dot(const Weight& weight) {
    DotWeight out;
    if (!weight.sparse) return out;
    if (dense_is_faster(weight)) {
        out.value.resize(static_cast<size_t>(weight.rows() * weight.cols()));
        weight.sparse->to_dense(out.value.data());
        return out;
    }
    Csr csr = to_csr(*weight.sparse);
    out.start = std::move(csr.row_start);
    out.value = std::move(csr.value);
    if (weight.cols() <= 1 << 16) {
        out.col16.assign(csr.col.begin(), csr.col.end());
        out.col16.resize(out.col16.size() + 16);
    } else {
        out.col32 = std::move(csr.col);
        out.col32.resize(out.col32.size() + 16);
    }
    return out;
}

}  // namespace sparseprune
