/* Products of few rows with what stands around them in a plan (engine/cuda/fusion.py). */
#include "multiply_few.cuh"
#include "multiply_panel.cuh"

/* x += the product, where x is what the norm behind it reads. */
struct matmul_add {
    struct matmul product;
    struct add_rmsnorm rest;
    using way = struct added;
};
struct rmsnorm_matmul {
    struct rmsnorm norm;
    struct matmul product;
    using way = struct normed;
};
struct rmsnorm_matmul_swiglu {
    struct rmsnorm norm;
    struct matmul product;
    struct swiglu gate;
    using way = struct normed_gated;
};

DEVICE struct product product_of(const struct matmul_add &op)
{
    struct product p = product_of(op.product);
    p.out = op.rest.x, p.out_stride = op.rest.x_stride;
    return p;
}
DEVICE struct product normed_product(const struct rmsnorm &norm, const struct matmul &matmul)
{
    struct product p = product_of(matmul);
    p.x = norm.x, p.x_stride = norm.x_stride, p.norm = norm.weight, p.eps = norm.eps;
    return p;
}
DEVICE struct product product_of(const struct rmsnorm_matmul &op) { return normed_product(op.norm, op.product); }
DEVICE struct product product_of(const struct rmsnorm_matmul_swiglu &op)
{
    struct product p = normed_product(op.norm, op.product);
    p.out = op.gate.out, p.out_width = op.gate.out_width, p.out_stride = op.gate.out_stride;
    return p;
}

template <class T, int ROWS, class Op> DEVICE void plain(const Op &op, const struct block &block)
{
    multiply_few<T, ROWS, typename Op::way>(product_of(op), block);
}
template <class Q, class Op> DEVICE void quantised(const Op &op, const struct block &block)
{
    multiply_panel<Q, typename Op::way>(product_of(op), block);
}

/* The kernels of each: one row and few, by the dtype of the weight. Of quantised ones few are as fast as one. */
#define KERNELS(op_name)                                                                             \
    KERNEL(op_name##_one_f32, op_name, THREADS) { plain<float, 1>(op, block); }                      \
    KERNEL(op_name##_one_bf16, op_name, THREADS) { plain<struct bf16, 1>(op, block); }               \
    KERNEL(op_name##_one_f16, op_name, THREADS) { plain<struct f16, 1>(op, block); }                 \
    KERNEL(op_name##_few_f32, op_name, THREADS) { plain<float, FEW>(op, block); }                    \
    KERNEL(op_name##_few_bf16, op_name, THREADS) { plain<struct bf16, FEW>(op, block); }             \
    KERNEL(op_name##_few_f16, op_name, THREADS) { plain<struct f16, FEW>(op, block); }               \
    KERNEL(op_name##_few_i8, op_name, op_name::way::OUTPUTS * THREADS) { quantised<i8>(op, block); } \
    KERNEL(op_name##_few_i4, op_name, op_name::way::OUTPUTS * THREADS) { quantised<i4>(op, block); } \
    KERNEL(op_name##_few_u8, op_name, op_name::way::OUTPUTS * THREADS) { quantised<u8>(op, block); } \
    KERNEL(op_name##_few_u4, op_name, op_name::way::OUTPUTS * THREADS) { quantised<u4>(op, block); }
KERNELS(matmul_add)
KERNELS(rmsnorm_matmul)
KERNELS(rmsnorm_matmul_swiglu)
#undef KERNELS
