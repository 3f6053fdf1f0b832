// The vector code of vector.h for machines with AVX2.
#define ELASTIFORM_ISA avx2
#define ELASTIFORM_ISA_LANES 8
#include "cpu/vector_kernel.h"
