/* A matrix times few rows or many. Few wait for memory: a warp reads a row of the matrix in whole lines and multiplies
 * it with all of them; of a quantised matrix a block reads PANEL rows, for tensor cores. Many are cut into tiles: in
 * float32 by ordinary multiply-adds, in bf16 by the tensor cores. Quantised matrices are widened on the way there. Tensor
 * cores see x rounded to bf16. Sums are float32. */
#include "multiply_few.cuh"
#include "multiply_panel.cuh"
#include "quants.cuh"

/* A tile of TILE × TILE outputs, each thread 4 × 4 of them: rows and columns that are 16 apart. */
template <class T> DEVICE void multiply_tile(const struct product &p)
{
    enum { DEPTH = 16, SIDE = 16, EACH = TILE / SIDE };
    __shared__ float x[DEPTH][TILE + 1], w[DEPTH][TILE + 1];
    int64_t first_row = blockIdx.y * (int64_t)TILE, first_column = blockIdx.x * (int64_t)TILE;
    if (first_row >= p.rows)
        return;
    int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
    float sum[EACH][EACH] = {};
    for (int64_t k = 0; k < p.k; k += DEPTH) {
        for (int i = threadIdx.x; i < TILE * DEPTH; i += THREADS) {
            int64_t at = k + i % DEPTH, row = first_row + i / DEPTH, column = first_column + i / DEPTH;
            x[i % DEPTH][i / DEPTH] = at < p.k && row < p.rows ? row_of(p, row)[at] : 0.0f;
            bool there = at < p.k && column < p.out_width;
            w[i % DEPTH][i / DEPTH] = there ? to_float(((const T *)(p.weight + column * row_bytes<T>(p.k)))[at]) : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int d = 0; d < DEPTH; d++)
#pragma unroll
            for (int i = 0; i < EACH; i++)
#pragma unroll
                for (int j = 0; j < EACH; j++)
                    sum[i][j] = fmaf(x[d][ty + i * SIDE], w[d][tx + j * SIDE], sum[i][j]);
        __syncthreads();
    }
    for (int i = 0; i < EACH; i++)
        for (int j = 0; j < EACH; j++) {
            int64_t row = first_row + ty + i * SIDE, column = first_column + tx + j * SIDE;
            if (row < p.rows && column < p.out_width)
                put(p, row, column, sum[i][j]);
        }
}

/* A tile of TILE × TILE outputs by tensor cores: 4 warps, each a quarter of 32 × 32. The next piece of the matrix is on
 * its way into shared memory while this one is multiplied, the next piece of x in registers. */
enum { BF16_DEPTH = 32, BF16_STRIDE = BF16_DEPTH + 8 }; /* 8 more, so that rows lie in different banks */

struct alignas(LINE) bf16_tiles {
    uint16_t x[2][TILE][BF16_STRIDE], w[2][TILE][BF16_STRIDE];
};

/* Each thread has 16 inputs of one row of x, and two lines of the matrix. */
DEVICE void fetch_x(const struct product &p, int64_t first_row, int64_t k, float *x)
{
    int64_t row = first_row + threadIdx.x / 2, at = k + threadIdx.x % 2 * 16;
#pragma unroll
    for (int i = 0; i < 16; i += 4)
        load_x<4>(row < p.rows ? row_of(p, row) + at + i : p.x, row < p.rows ? p.k - at - i : 0, x + i);
}
DEVICE void keep_x(uint16_t (*tile)[BF16_STRIDE], const float *x)
{
    uint32_t *to = (uint32_t *)&tile[threadIdx.x / 2][threadIdx.x % 2 * 16];
#pragma unroll
    for (int i = 0; i < 8; i++)
        to[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
}

/* A piece of a matrix on its way: in bf16 it goes straight into the tile, quants stay in registers until they are widened,
 * each warp those of a panel. */
struct bf16_piece {};
DEVICE void fetch_weight(const struct product &p, int64_t first_column, int64_t k, uint16_t (*tile)[BF16_STRIDE],
                         struct bf16_piece &)
{
    int64_t size = row_bytes<struct bf16>(p.k);
#pragma unroll
    for (int i = threadIdx.x; i < TILE * 4; i += TENSOR_THREADS) {
        int64_t column = first_column + i / 4, byte = k * 2 + i % 4 * LINE;
        bool there = column < p.out_width && byte < size;
        copy_line(&tile[i / 4][i % 4 * 8], there ? p.weight + column * size + byte : p.weight, there ? LINE : 0);
    }
    commit_copies();
}
DEVICE void keep_weight(uint16_t (*)[BF16_STRIDE], const struct bf16_piece &) { wait_for_copies<0>(); }

template <class Q> struct quant_piece {
    enum { STEPS = BF16_DEPTH / Q::STEP };
    struct alignas(4 * STEPS * Q::WORDS) { uint32_t words[STEPS][Q::WORDS]; } quants;
    struct head heads[STEPS];
};
template <class Q>
DEVICE void fetch_weight(const struct product &p, int64_t first_column, int64_t k, uint16_t (*)[BF16_STRIDE],
                         struct quant_piece<Q> &piece)
{
    int64_t index = first_column / PANEL + threadIdx.x / WARP;
    if (index * PANEL >= p.out_width)
        return; /* what the piece holds then is multiplied for nobody */
    struct panel panel = panel_of<Q>(p.weight, p.k, p.group, index, threadIdx.x % WARP);
    const char *line = panel.lines + k / Q::INPUTS * (WARP * LINE) + k % Q::INPUTS / Q::STEP * Q::WORDS * 4;
    piece.quants = *(const decltype(piece.quants) *)line;
#pragma unroll
    for (int s = 0; s < piece.STEPS; s++)
        piece.heads[s] = head_at<Q>(panel, (int)k + s * Q::STEP);
}
template <class Q> DEVICE void keep_weight(uint16_t (*tile)[BF16_STRIDE], const struct quant_piece<Q> &piece)
{
    int lane = threadIdx.x % WARP, first = threadIdx.x / WARP * PANEL + lane / 4;
#pragma unroll
    for (int s = 0; s < piece.STEPS; s++) {
        uint32_t pairs[4];
        widen_step<Q>(piece.quants.words[s], pairs);
#pragma unroll
        for (int upper = 0; upper < 2; upper++) {
            float scale = scale_of<Q>(piece.heads[s], upper) * WIDENED, minimum = minimum_of<Q>(piece.heads[s], upper);
            uint32_t even = pairs[upper], odd = pairs[2 + upper];
            uint32_t *to = (uint32_t *)&tile[first + upper * 8][s * Q::STEP + lane % 4 * 4];
            to[0] = pack_bf16(fmaf(low_bf16(even), scale, minimum), fmaf(low_bf16(odd), scale, minimum));
            to[1] = pack_bf16(fmaf(high_bf16(even), scale, minimum), fmaf(high_bf16(odd), scale, minimum));
        }
    }
}

/* Adds the product of two pieces to a warp's 32 × 32 sums. */
DEVICE void multiply_piece(uint16_t (*x)[BF16_STRIDE], uint16_t (*w)[BF16_STRIDE], float (*sum)[4][4])
{
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
    for (int k = 0; k < BF16_DEPTH; k += 16) {
        uint32_t a[2][4], b[4][2];
#pragma unroll
        for (int i = 0; i < 2; i++)
            load_matrices(a[i], &x[warp / 2 * 32 + i * 16 + lane % 16][k + lane / 16 * 8]);
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
            uint32_t pair[4];
            load_matrices(pair, &w[warp % 2 * 32 + (j + lane / 16) * 8 + lane % 8][k + lane / 8 % 2 * 8]);
            b[j][0] = pair[0], b[j][1] = pair[1], b[j + 1][0] = pair[2], b[j + 1][1] = pair[3];
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                mma_bf16(sum[i][j], a[i], b[j]);
    }
}

template <class Piece> DEVICE void multiply_tensors(const struct product &p)
{
    __shared__ struct bf16_tiles tiles;
    int64_t first_row = blockIdx.y * (int64_t)TILE, first_column = blockIdx.x * (int64_t)TILE;
    if (first_row >= p.rows)
        return;
    float sum[2][4][4] = {}, x[16];
    Piece piece = {};
    if (p.k > 0) {
        fetch_x(p, first_row, 0, x);
        fetch_weight(p, first_column, 0, tiles.w[0], piece);
    }
    for (int64_t k = 0, turn = 0; k < p.k; k += BF16_DEPTH, turn ^= 1) {
        keep_x(tiles.x[turn], x);
        keep_weight(tiles.w[turn], piece);
        __syncthreads(); /* this turn's pieces are here, and nobody reads the other turn's any more */
        if (k + BF16_DEPTH < p.k) {
            fetch_x(p, first_row, k + BF16_DEPTH, x);
            fetch_weight(p, first_column, k + BF16_DEPTH, tiles.w[turn ^ 1], piece);
        }
        multiply_piece(tiles.x[turn], tiles.w[turn], sum);
    }
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int c = 0; c < 4; c++) {
                int64_t row = first_row + warp / 2 * 32 + i * 16 + c / 2 * 8 + lane / 4;
                int64_t column = first_column + warp % 2 * 32 + j * 8 + lane % 4 * 2 + c % 2;
                if (row < p.rows && column < p.out_width)
                    put(p, row, column, sum[i][j][c]);
            }
}

/* The kernels of an op: one row, few, many, by the dtype of the weight. Of quantised ones few are as fast as one. */
#define KERNELS(op_name)                                                                                             \
    KERNEL(op_name##_one_f32, op_name, THREADS) { multiply_few<float, 1, alone>(product_of(op), block); }            \
    KERNEL(op_name##_one_bf16, op_name, THREADS) { multiply_few<struct bf16, 1, alone>(product_of(op), block); }     \
    KERNEL(op_name##_one_f16, op_name, THREADS) { multiply_few<struct f16, 1, alone>(product_of(op), block); }       \
    KERNEL(op_name##_few_f32, op_name, THREADS) { multiply_few<float, FEW, alone>(product_of(op), block); }          \
    KERNEL(op_name##_few_bf16, op_name, THREADS) { multiply_few<struct bf16, FEW, alone>(product_of(op), block); }   \
    KERNEL(op_name##_few_f16, op_name, THREADS) { multiply_few<struct f16, FEW, alone>(product_of(op), block); }     \
    KERNEL(op_name##_few_i8, op_name, THREADS) { multiply_panel<i8, alone>(product_of(op), block); }                 \
    KERNEL(op_name##_few_i4, op_name, THREADS) { multiply_panel<i4, alone>(product_of(op), block); }                 \
    KERNEL(op_name##_few_u8, op_name, THREADS) { multiply_panel<u8, alone>(product_of(op), block); }                 \
    KERNEL(op_name##_few_u4, op_name, THREADS) { multiply_panel<u4, alone>(product_of(op), block); }                 \
    KERNEL(op_name##_many_f32, op_name, THREADS) { multiply_tile<float>(product_of(op)); }                           \
    KERNEL(op_name##_many_f16, op_name, THREADS) { multiply_tile<struct f16>(product_of(op)); }                      \
    KERNEL(op_name##_many_bf16, op_name, TENSOR_THREADS) { multiply_tensors<struct bf16_piece>(product_of(op)); }    \
    KERNEL(op_name##_many_i8, op_name, TENSOR_THREADS) { multiply_tensors<struct quant_piece<i8>>(product_of(op)); } \
    KERNEL(op_name##_many_i4, op_name, TENSOR_THREADS) { multiply_tensors<struct quant_piece<i4>>(product_of(op)); } \
    KERNEL(op_name##_many_u8, op_name, TENSOR_THREADS) { multiply_tensors<struct quant_piece<u8>>(product_of(op)); } \
    KERNEL(op_name##_many_u4, op_name, TENSOR_THREADS) { multiply_tensors<struct quant_piece<u4>>(product_of(op)); }
KERNELS(matmul)
KERNELS(logits)
