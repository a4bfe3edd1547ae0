/* x86-64-v4. */
#define LOOPOS_LEVEL v4
#include "level.c.inc"
