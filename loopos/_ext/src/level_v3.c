/* x86-64-v3. */
#define LOOPOS_LEVEL v3
#include "level.c.inc"
