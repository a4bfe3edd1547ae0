/* Whatever the compiler builds for by default: processors that are not x86-64. */
#define LOOPOS_LEVEL generic
#include "level.c.inc"
