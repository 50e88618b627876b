// All CUDA kernels of residual blocks. Each header defines kernels and the host function that launches them. They are
// one translation unit, as every further one costs 2 s of the first import.
#include "residual/add_relu_backward.cuh"
#include "residual/batch_norm_stats.cuh"
#include "residual/norm_add_relu.cuh"
#include "residual/norm_grads.cuh"
#include "residual/norm_relu_backward.cuh"
#include "residual/norm_relu_max_pool.cuh"
