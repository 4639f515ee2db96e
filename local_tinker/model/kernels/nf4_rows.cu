// x (rows, inputs) times up to three NF4 weights and a dense matrix below them, summed in fp32 on the tensor cores.
//
// The weights are the sixteen rows of a product of m16n8k16 and x its eight columns. Which inputs stand where in it is
// free as long as both agree, so a lane keeps what one load of sixteen bytes brings: 32 inputs in a row of one output,
// which share an absmax. With up to four rows of x the lower eight rows of the product are the same outputs at other
// inputs, and its last four columns x there: of the four quarters of what it gives, two count.
//
// What limits four-bit products of few rows is the instructions that a weight costs. A byte, two weights, is looked up
// at once: the table of all 256 pairs of levels stands in shared memory sixteen times, once for each lane of those that
// read together, so that no two lanes wait for a bank. Then two multiplications with absmax, which round as dequantising
// does, and one conversion, which leaves the pair as the tensor cores take it.
//
// Constants of an instance: KIND ("bf16" or "f16"), ROWS (at most so many of x: 4, 8 or 16), THREADS of a program, RESIDENT
// programs on a multiprocessor where its shared memory is enough, OUTPUTS of a warp, STEP inputs that it takes at once.

typedef unsigned int u32;
typedef unsigned char u8;
typedef unsigned short u16;

constexpr int WARPS = THREADS / 32;
constexpr bool SPLIT = ROWS <= 4;  // half the outputs, twice the inputs
constexpr int COLUMNS = ROWS > 8 ? 2 : 1;  // of eight
constexpr int BLOCK = 64;    // weights that share an absmax
constexpr int HALF = 128;    // inputs that a step takes of an output at once: four lanes, sixteen bytes each
static_assert(OUTPUTS == (SPLIT ? 8 : 16) && STEP == (SPLIT ? 2 * HALF : HALF), "tiles and steps go with ROWS");
constexpr int NESTED = 256;  // absmaxes that share a scale
constexpr int COPIES = 16;   // of the table of pairs

__device__ __forceinline__ u32 rounded(float low, float high) {
    u32 pair;
    asm("cvt.rn." KIND "x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ float widened(u16 value) {
    float wide;
    asm("cvt.f32." KIND " %0, %1;" : "=f"(wide) : "h"(value));
    return wide;
}

__device__ __forceinline__ void multiply_add(float (&sums)[4], const u32 (&w)[4], u32 x0, u32 x1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." KIND "." KIND ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "r"(x0), "r"(x1));
}

// Addresses in shared memory are worked out by hand: an extraction and a multiply-add, which share no pipe.
__device__ __forceinline__ u32 byte_of(u32 word, int which) { return __byte_perm(word, 0, 0x4440 + which); }

__device__ __forceinline__ float2 pair_at(u32 table, u32 index) {
    u32 at;
    float2 pair;
    asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(at) : "r"(index), "n"(8 * COPIES), "r"(table));
    asm("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(at));
    return pair;
}

// What a lane does: of its half h (0 or 1) output `output(h)` of a warp's, inputs from `input(h)` of every step.
struct Lane {
    int eighth, quarter;

    __device__ __forceinline__ Lane() : eighth(threadIdx.x % 32 / 4), quarter(threadIdx.x % 4) {}
    __device__ __forceinline__ int output(int h) const { return eighth + (SPLIT ? 0 : 8 * h); }
    __device__ __forceinline__ int input(int h) const { return quarter * 32 + (SPLIT ? HALF * h : 0); }
    __device__ __forceinline__ int x_row(int c) const { return SPLIT ? eighth % 4 : eighth + 8 * c; }
    __device__ __forceinline__ int x_input() const { return input(SPLIT ? eighth / 4 : 0); }
};

// Where a lane reads x. Rows that are not there are read from the last one: each column has sums of its own, and those
// are not kept. Past the last input it reads the last ones again, for weights that are zero there.
struct Columns {
    const u16* rows[COLUMNS];
    int input, last;

    __device__ __forceinline__ Columns(const Lane& lane, const u16* x, int count, int inputs)
        : input(lane.x_input()), last(inputs - 32) {
        for (int c = 0; c < COLUMNS; c++) rows[c] = x + (size_t)min(lane.x_row(c), count - 1) * inputs;
    }
    __device__ __forceinline__ int at(int step) const { return min(step * STEP + input, last); }
};

__device__ __forceinline__ uint4 eight(const u16* from) { return *reinterpret_cast<const uint4*>(from); }

struct Packed {
    const u8* bytes;
    const u8* codes;
    const float* scales;
    const float* offset;
    int outputs;
};

// Tiles of all weights, one after the other. Those of the dense matrix are apart.
struct Parts {
    Packed parts[3];
    int inputs;

    __device__ __forceinline__ int tiles(int part) const { return (parts[part].outputs + OUTPUTS - 1) / OUTPUTS; }
    __device__ __forceinline__ int tiles() const { return tiles(0) + tiles(1) + tiles(2); }

    // The weight that a tile is of; `tile` becomes the one within it, `base` its first output.
    __device__ __forceinline__ Packed of(int& tile, int& base) const {
        base = 0;
        if (tile < tiles(0)) return parts[0];
        tile -= tiles(0), base = parts[0].outputs;
        if (tile < tiles(1)) return parts[1];
        tile -= tiles(1), base += parts[1].outputs;
        return parts[2];
    }
};

struct Step {  // what a lane multiplies in one
    uint4 bytes[2];
    float scales[2];
    u32 codes[2];
};

// Reads the steps of a warp's tiles one after the other, one ahead of the products and across the ends of tiles.
struct Reader {
    const Parts& all;
    const Lane lane;
    int tile, stride, step, first, every, steps;
    const u8* bytes[2];
    const u8* codes[2];
    const float* scales;
    int block[2];

    __device__ __forceinline__ Reader(const Parts& all, int tile, int stride, int first, int every)
        : all(all), tile(tile), stride(stride), step(first), first(first), every(every),
          steps((all.inputs + STEP - 1) / STEP) {
        enter();
    }

    __device__ __forceinline__ void enter() {
        if (tile >= all.tiles()) return;
        int own = tile, base;
        const Packed weight = all.of(own, base);
        scales = weight.scales;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int output = min(own * OUTPUTS + lane.output(h), weight.outputs - 1);
            bytes[h] = weight.bytes + (size_t)output * (all.inputs / 2);
            block[h] = output * (all.inputs / BLOCK);
            codes[h] = weight.codes + block[h];
        }
    }

    __device__ __forceinline__ void read(Step& to) {
        if (step >= steps) {
            tile += stride, step = first;
            enter();
        }
        if (tile >= all.tiles() || step >= steps) return;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int input = min(step * STEP + lane.input(h), all.inputs - 32), at = input / BLOCK;
            to.bytes[h] = *reinterpret_cast<const uint4*>(bytes[h] + input / 2);
            to.codes[h] = codes[h][at];
            to.scales[h] = scales[(block[h] + at) / NESTED];
        }
        step += every;
    }
};

__device__ __forceinline__ void packed_step(
    float (&sums)[COLUMNS][4], const Step& now, int step, const Columns& x, int inputs, u32 pairs, const float* absmaxes,
    float offset
) {
    const Lane lane;
    float absmax[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const float value = __fadd_rn(__fmul_rn(absmaxes[now.codes[h]], now.scales[h]), offset);
        absmax[h] = step * STEP + lane.input(h) < inputs ? value : 0.0f;
    }
    const int at = x.at(step);
#pragma unroll
    for (int word = 0; word < 4; word++) {
        u32 weights[4][2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const u32 four = (&now.bytes[h].x)[word];
#pragma unroll
            for (int b = 0; b < 4; b++) {
                const float2 pair = pair_at(pairs, byte_of(four, b));
                weights[b][h] = rounded(__fmul_rn(pair.x, absmax[h]), __fmul_rn(pair.y, absmax[h]));
            }
        }
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            const uint4 column = eight(x.rows[c] + at + 8 * word);
            multiply_add(sums[c], {weights[0][0], weights[0][1], weights[1][0], weights[1][1]}, column.x, column.y);
            multiply_add(sums[c], {weights[2][0], weights[2][1], weights[3][0], weights[3][1]}, column.z, column.w);
        }
    }
}

__device__ __forceinline__ void dense_step(
    float (&sums)[COLUMNS][4], const u16* const (&row)[2], int step, const Columns& x, int inputs
) {
    const Lane lane;
#pragma unroll
    for (int word = 0; word < 4; word++) {
        uint4 w[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int input = step * STEP + lane.input(h);
            w[h] = input < inputs ? eight(row[h] + input + 8 * word) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            const uint4 column = eight(x.rows[c] + x.at(step) + 8 * word);
            multiply_add(sums[c], {w[0].x, w[1].x, w[0].y, w[1].y}, column.x, column.y);
            multiply_add(sums[c], {w[0].z, w[1].z, w[0].w, w[1].w}, column.z, column.w);
        }
    }
}

// Programmatic dependent launch, see dependent.py.
__device__ __forceinline__ void send_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void wait_for_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

struct Out {
    u16* y;
    const u16* bias;
    int rows, stride, biases;
};

// Adds up what the warps of a tile have and stores it. All warps of a program come here together.
__device__ __forceinline__ void finish(
    float (&sums)[COLUMNS][4], float4 (*shares)[WARPS][32], const Out& out, int tile, int outputs, int base, int split,
    int splits
) {
    const Lane lane;
    const int warp = threadIdx.x / 32, own = threadIdx.x % 32;
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
        if (SPLIT)
            for (int i = 0; i < 2; i++) sums[c][i] += __shfl_down_sync(~0u, sums[c][i + 2], 2);
        if (splits > 1) shares[c][warp][own] = make_float4(sums[c][0], sums[c][1], sums[c][2], sums[c][3]);
    }
    if (splits > 1) {
        __syncthreads();
        for (int other = 1; split == 0 && other < splits; other++)
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                const float4 more = shares[c][warp + other][own];
                sums[c][0] += more.x, sums[c][1] += more.y, sums[c][2] += more.z, sums[c][3] += more.w;
            }
        __syncthreads();
    }
    if (split > 0) return;
#pragma unroll
    for (int c = 0; c < COLUMNS; c++)
#pragma unroll
        for (int i = 0; i < (SPLIT ? 2 : 4); i++) {
            const int output = tile * OUTPUTS + lane.output(i / 2), row = 8 * c + 2 * lane.quarter + i % 2;
            if (output < outputs && row < out.rows && (!SPLIT || lane.quarter < 2)) {
                const int at = base + output;
                const float sum = sums[c][i] + (at < out.biases ? widened(out.bias[at]) : 0.0f);
                out.y[(size_t)row * out.stride + at] = (u16)rounded(sum, 0.0f);
            }
        }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) nf4_rows(
    const u8* bytes0, const u8* codes0, const float* scales0, const float* offset0, int outputs0,
    const u8* bytes1, const u8* codes1, const float* scales1, const float* offset1, int outputs1,
    const u8* bytes2, const u8* codes2, const float* scales2, const float* offset2, int outputs2,
    const float* table, const float* levels, const u16* x, const u16* below, const u16* bias, u16* y,
    int rows, int inputs, int below_rows, int below_stride, int y_stride, int biases, int splits
) {
    __shared__ float2 pairs[256][COPIES];
    __shared__ float absmaxes[256];
    __shared__ float4 shares[COLUMNS][WARPS][32];
    const Lane lane;
    const int warp = threadIdx.x / 32, split = warp % splits, slots = WARPS / splits, slot = warp / splits;
    const int steps = (inputs + STEP - 1) / STEP, stride = gridDim.x * slots;
    const Parts all = {
        {{bytes0, codes0, scales0, offset0, outputs0}, {bytes1, codes1, scales1, offset1, outputs1},
         {bytes2, codes2, scales2, offset2, outputs2}}, inputs};

    Reader reader(all, blockIdx.x * slots + slot, stride, split, splits);
    Step next;
    reader.read(next);  // on its way while the tables are filled: weights, which no kernel before writes

    for (int i = threadIdx.x; i < 256 * COPIES; i += THREADS)
        pairs[i / COPIES][i % COPIES] = make_float2(levels[i / COPIES / 16], levels[i / COPIES % 16]);
    for (int i = threadIdx.x; i < 256; i += THREADS) absmaxes[i] = table[i];
    __syncthreads();

    const u32 copy = (u32)__cvta_generic_to_shared(&pairs[0][threadIdx.x % COPIES]);
    u32 lookup;  // an address that is only known now, so that nothing is looked up before the table is filled
    asm volatile("mov.u32 %0, %1;" : "=r"(lookup) : "r"(copy) : "memory");
    wait_for_before();
    const Columns columns(lane, x, rows, inputs);
    const Out out = {y, bias, rows, y_stride, biases};
    for (int start = blockIdx.x * slots; start < all.tiles(); start += stride) {
        int tile = start + slot, base = 0, outputs = 0;
        float sums[COLUMNS][4] = {};
        if (tile < all.tiles()) {
            const Packed weight = all.of(tile, base);
            const float offset = *weight.offset;
            outputs = weight.outputs;
            for (int step = split; step < steps; step += splits) {
                const Step now = next;
                reader.read(next);
                packed_step(sums, now, step, columns, inputs, lookup, absmaxes, offset);
            }
        }
        finish(sums, shares, out, tile, outputs, base, split, splits);
    }
    send_next();  // no sooner: the next one's programs would all gather where the first of these end
    // The last programs have the fewest tiles of the weights.
    for (int start = (gridDim.x - 1 - blockIdx.x) * slots; start * OUTPUTS < below_rows; start += stride) {
        const int tile = start + slot;
        float sums[COLUMNS][4] = {};
        const u16* row[2];
#pragma unroll
        for (int h = 0; h < 2; h++)
            row[h] = below + (size_t)min(tile * OUTPUTS + lane.output(h), below_rows - 1) * below_stride;
        for (int step = split; step < steps; step += splits) dense_step(sums, row, step, columns, inputs);
        finish(sums, shares, out, tile, below_rows, outputs0 + outputs1 + outputs2, split, splits);
    }
}
