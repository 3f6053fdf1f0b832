// The matrix engine's kernels in four lanes, for any machine.
#define ELASTIFORM_ISA portable
#define ELASTIFORM_ISA_LANES 4
#define ELASTIFORM_TILE_ROWS 6
#include "cpu/gemm/kernel_body.h"
