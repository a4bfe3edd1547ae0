/* Whatever the compiler builds for by default: processors that are not x86-64. */
#if !defined(__x86_64__)
#define LOOPOS_LEVEL generic
#include "level.c.inc"
#endif
