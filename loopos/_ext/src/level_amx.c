/* AMX beside AVX-512: products, all else is that of v4. Nothing for the other half of a universal
   binary. */
#if defined(__x86_64__)
#define LOOPOS_SPLIT
#include "product.c.inc"

extern const loopos_table loopos_table_v4;

#include "packed_split.c.inc"
#include "attention_split.c.inc"
#include "attention_backward_split.c.inc"

/* A sum over fewer tokens than this, into a gradient that is much larger than what is read for it, waits
   for memory: splitting numbers and registers that hold 32 x 32 sums gain nothing. (Of all other products
   those with k = 1 look like this, whatever their rows.) */
#define LEAST_TOKENS 24

static int products_amx(int threads, long count, const loopos_product *p) {
    if (p->a_row == 1 && p->b_col == 1 && p->k < LEAST_TOKENS)
        return loopos_table_v4.products(threads, count, p);
    return products(threads, count, p);
}
static int product_amx(int threads, const loopos_product *p) { return products_amx(threads, 1, p); }

extern const loopos_table loopos_table_amx;
const loopos_table loopos_table_amx = {
    .name = "amx",
    .vector_floats = LANES,
    .product = product_amx,
    .products = products_amx,
    .packed_product = packed_product_amx,
    .attention = attention_amx,
    .attention_backward = attention_backward_amx,
};
#endif
