// For wheels (REWARDOPS_MANYLINUX): functions of glibc in their oldest versions. A build on a newer glibc would take
// newer ones, which the systems that a manylinux wheel promises to run on do not have.
//
// The linker takes these definitions for every object of the module, those of the static C++ library included. Each is
// one jump to the function itself. `auditwheel repair` refuses a module that needs one more of them.
#if defined(__x86_64__)
#define REWARDOPS_OLDEST "GLIBC_2.2.5"
#define REWARDOPS_FINITE "GLIBC_2.15"
#elif defined(__aarch64__)
#define REWARDOPS_OLDEST "GLIBC_2.17"
#define REWARDOPS_FINITE "GLIBC_2.17"
#else
#error "which version of glibc was the first on this machine?"
#endif

#define REWARDOPS_HIDDEN __attribute__((visibility("hidden")))
// No header that declares `name` is included: the parameters need its size and class alone.
#define REWARDOPS_FROM(symbol, result, name, parameters, arguments) \
  __asm__(".symver oldest_" #name ", " symbol);                     \
  result oldest_##name parameters;                                  \
  result our_##name parameters __asm__(#name);                      \
  REWARDOPS_HIDDEN result our_##name parameters { return oldest_##name arguments; }
#define REWARDOPS_FROM_OLDEST(result, name, parameters, arguments) \
  REWARDOPS_FROM(#name "@" REWARDOPS_OLDEST, result, name, parameters, arguments)
// The function without the wrapper that sets errno, which costs time in its oldest version: the same bits for every
// number, infinities and NaN included.
#define REWARDOPS_MATH(name, parameters, arguments) \
  REWARDOPS_FROM("__" #name "_finite@" REWARDOPS_FINITE, double, name, parameters, arguments)

extern "C" {

REWARDOPS_MATH(exp, (double x), (x))
REWARDOPS_MATH(exp2, (double x), (x))
REWARDOPS_MATH(log, (double x), (x))
REWARDOPS_MATH(pow, (double x, double y), (x, y))
REWARDOPS_FROM_OLDEST(int, pthread_create, (void* id, void* options, void* (*run)(void*), void* data),
                      (id, options, run, data))
REWARDOPS_FROM_OLDEST(int, pthread_mutex_trylock, (void* mutex), (mutex))
REWARDOPS_FROM_OLDEST(int, pthread_once, (void* done, void (*run)()), (done, run))
REWARDOPS_FROM_OLDEST(int, __pthread_key_create, (void* key, void (*destroy)(void*)), (key, destroy))

// False: counts of references are atomic even where the process has one thread.
REWARDOPS_HIDDEN char __libc_single_threaded = 0;

}  // extern "C"
