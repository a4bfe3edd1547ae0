/* x86-64-v4; nothing for the other half of a universal binary. */
#if defined(__x86_64__)
#define LOOPOS_LEVEL v4
#include "level.c.inc"

const attention_runs loopos_attention_v4 = {attention_group, forward_floats, backward_run,
                                            backward_floats};
#endif
