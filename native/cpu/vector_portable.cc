// The vector code of vector.h for every machine.
#define ELASTIFORM_ISA portable
#define ELASTIFORM_ISA_LANES 4
#include "cpu/vector_kernel.h"
