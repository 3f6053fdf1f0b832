// The vector code of vector.h for machines with AVX-512.
#define ELASTIFORM_ISA avx512
#define ELASTIFORM_ISA_LANES 16
#include "cpu/vector_kernel.h"
