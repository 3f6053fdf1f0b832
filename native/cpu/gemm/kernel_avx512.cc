// The matrix engine's kernels for AVX-512: 14 x 32 tiles, 28 accumulators.
#define ELASTIFORM_ISA avx512
#define ELASTIFORM_ISA_LANES 16
#define ELASTIFORM_TILE_ROWS 14
#include "cpu/gemm/kernel_body.h"
