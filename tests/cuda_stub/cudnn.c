/* The functions of cuDNN that give something back; build.sh generates the others, which do nothing. */

#include <stdlib.h>
#include <string.h>

extern void stub_log(const char *what, const char *detail);

/* Numbers of cuDNN's backend API. */
enum { ENGINE_CONFIGURATION = 4 };             /* cudnnBackendDescriptorType_t: the heuristics made a plan */
enum { OPERATION_GRAPH_OPERATIONS_COUNT = 302 }; /* cudnnBackendAttributeName_t: nothing behind it */
enum { HANDLE, INT64 = 3, NUMERICAL_NOTE = 11, DESCRIPTOR = 15 };

long cudnnBackendCreateDescriptor(int type, void **made) {
    if (type == ENGINE_CONFIGURATION) stub_log("plan", "");
    *made = calloc(1, 256);
    return 0;
}

long cudnnBackendGetAttribute(void *descriptor, int name, int type, long most, long *count, void *values) {
    int some = type == DESCRIPTOR || type == INT64 || type == 2 || type == HANDLE;
    if (count) *count = name != OPERATION_GRAPH_OPERATIONS_COUNT && some;
    if (values && most >= 1 && type == INT64) *(long *)values = 0;
    else if (values && most == 1 && type != DESCRIPTOR) *(int *)values = 0;
    return 0;
}

long cudnnBackendExecute(void) { stub_log("library", "cudnnBackendExecute"); return 0; }
long cudnnGetTensorNdDescriptor(void) { return 0; }

long cudnnGetConvolutionForwardWorkspaceSize(void *a, void *b, void *c, void *d, void *e, int algorithm, size_t *bytes) {
    *bytes = 0;
    return 0;
}
long cudnnGetConvolutionForwardAlgorithm_v7(
    void *a, void *b, void *c, void *d, void *e, int most, int *found, char *performance
) {
    *found = 1;
    memset(performance, 0, 48);
    return 0;
}
long cudnnFindConvolutionForwardAlgorithmEx(
    void *a, void *b, void *c, void *d, void *e, void *f, void *g, void *h, void *i, int most, int *found,
    char *performance
) {
    *found = 1;
    memset(performance, 0, 48);
    return 0;
}
