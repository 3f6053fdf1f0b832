// The matrix engine's kernels for AVX2 with FMA: 6 x 16 tiles, twelve accumulators.
#define ELASTIFORM_ISA avx2
#define ELASTIFORM_ISA_LANES 8
#define ELASTIFORM_TILE_ROWS 6
#include "cpu/gemm/kernel_body.h"
