/* x86-64-v2. */
#define LOOPOS_LEVEL v2
#include "level.c.inc"
