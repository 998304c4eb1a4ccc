// Moving activations: im2col panels, padded or phase-split plane copies, adds. Included after one vec_*.h.
#pragma once

void im2col(const Im2colJob& job) {
    for (int64_t c = job.channel_begin; c < job.channel_end; ++c) {
        const float* plane = job.in + c * job.in_plane;
        for (int64_t tap = 0; tap < job.taps; ++tap) {
            float* out = job.panel + (c * job.taps + tap) * job.panel_plane;
            for (int64_t v = 0; v < job.vectors; ++v, out += kLanes) {
                const int64_t i = tap * job.tap_vectors + v;
                const V x = job.start[i] != INT32_MIN ? load_lanes(plane + job.start[i], job.masks[i])
                                                      : gather(plane, job.index + i * kLanes);
                storeu(out, x);
            }
        }
    }
}

void copy_row(const RowCopy& job) {
    float* out = job.out;
    for (int64_t i = 0; i < job.lead; ++i) *out++ = 0.0f;
    int64_t i = 0;
    if (job.stride == 1) {
        for (; i + kLanes <= job.count; i += kLanes) storeu(out + i, loadu(job.in + i));
    } else if (job.stride == 2) {
        // the last element read is 2 * (count - 1): the vector of 32 may only be loaded where all of it is the row's
        for (; i + kLanes < job.count; i += kLanes)
            storeu(out + i, even_lanes(loadu(job.in + 2 * i), loadu(job.in + 2 * i + kLanes)));
    }
    for (; i < job.count; ++i) out[i] = job.in[i * job.stride];
    out += job.count;
    for (int64_t j = 0; j < job.tail; ++j) *out++ = 0.0f;
}

void add_row(const float* a, const float* b, float* out, int64_t count, KernelAct act) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        V v = loadu(a + i);
        if (b) v = add(v, loadu(b + i));
        storeu(out + i, activate(v, act));
    }
    for (; i < count; ++i) {
        out[i] = finish_scalar(b ? a[i] + b[i] : a[i], 0, nullptr, nullptr, act);
    }
}
