/* The kernels of loopos for C code in another extension module, found at run time:

       #include "loopos_import.h"
       const loopos_api *loopos = loopos_import();   (with the interpreter's lock; NULL: exception)
       if (loopos->kernels()->product(4, &p)) ...    (without it, if you like)

   Call the functions through the table; those that loopos.h declares are not there to be linked. */
#ifndef LOOPOS_IMPORT_H
#define LOOPOS_IMPORT_H

#include "loopos.h"

/* Raised when a struct or a function means something else, though its size be the same. */
#define LOOPOS_API_VERSION 4
#define LOOPOS_STRUCT_BYTES \
    (sizeof(loopos_product) + sizeof(loopos_packed) + sizeof(loopos_pack) + sizeof(loopos_loss_rows) + \
     sizeof(loopos_kl_rows) + sizeof(loopos_sample) + sizeof(loopos_attention) + \
     sizeof(loopos_cached) + sizeof(loopos_rope) + sizeof(loopos_map) + sizeof(loopos_norm) + \
     sizeof(loopos_rows) + sizeof(loopos_dropout) + sizeof(loopos_tensor) + sizeof(loopos_update) + \
     sizeof(loopos_sgd))
#define LOOPOS_API_NAME "loopos._ext.kernels._C_API"

typedef struct {
    int version;          /* LOOPOS_API_VERSION */
    size_t table_bytes;   /* of a loopos_table, in the build that runs */
    size_t struct_bytes;  /* LOOPOS_STRUCT_BYTES */
    int (*parallel)(int threads, long count, size_t scratch_bytes, loopos_task task, void *context);
    void *(*take)(size_t bytes);
    void (*give)(void *block);
    const loopos_table *(*kernels)(void);
} loopos_api;

#if defined(Py_PYTHON_H) && !defined(LOOPOS_NO_IMPORT)
static inline const loopos_api *loopos_import(void) {
    PyObject *module = PyImport_ImportModule("loopos._ext.kernels");
    if (module == NULL) return NULL;
    Py_DECREF(module); /* sys.modules holds it */
    const loopos_api *api = (const loopos_api *)PyCapsule_Import(LOOPOS_API_NAME, 0);
    if (api == NULL) return NULL;
    if (api->version != LOOPOS_API_VERSION || api->table_bytes < sizeof(loopos_table) ||
        api->struct_bytes != LOOPOS_STRUCT_BYTES) {
        PyErr_Format(PyExc_ImportError,
                     "loopos: built against version %d of its C interface, found version %d; "
                     "build the module again",
                     LOOPOS_API_VERSION, api->version);
        return NULL;
    }
    return api;
}
#endif

#endif
