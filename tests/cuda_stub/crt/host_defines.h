/* What driver_types.h needs of a compiler's header that comes with no package: its attributes mean nothing on a host. */
#pragma once
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __cudart_builtin__
#define __builtin_align__(n) __attribute__((aligned(n)))
#define __align__(n) __attribute__((aligned(n)))
#define __CUDA_ARCH_LIST__ 900
#define CUDARTAPI
#define __host__
#define __device__
