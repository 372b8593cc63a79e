/* A libcuda.so.1 that says what the environment tells it: FAKE_CUDA_VERSION is the version of the driver, and
   FAKE_CUDA_INIT what cuInit returns. Beyond these it has no functions. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static int number(const char* name, int otherwise) {
  const char* text = getenv(name);
  return text ? atoi(text) : otherwise;
}

int cuInit(unsigned flags) {
  (void)flags;
  return number("FAKE_CUDA_INIT", 0);
}
int cuDriverGetVersion(int* version) {
  *version = number("FAKE_CUDA_VERSION", 13000);
  return 0;
}
int cuDeviceGetCount(int* count) {
  *count = 0;
  return 0;
}

int cuGetProcAddress_v2(const char* name, void** function, int version, uint64_t flags, void* status) {
  (void)version;
  (void)flags;
  *function = 0;
  if (!strcmp(name, "cuInit")) *function = (void*)cuInit;
  if (!strcmp(name, "cuDriverGetVersion")) *function = (void*)cuDriverGetVersion;
  if (!strcmp(name, "cuDeviceGetCount")) *function = (void*)cuDeviceGetCount;
  if (!strcmp(name, "cuGetProcAddress")) *function = (void*)cuGetProcAddress_v2;
  if (status) *(int*)status = *function ? 0 : 1;
  return *function ? 0 : 500;
}
int cuGetProcAddress(const char* name, void** function, int version, uint64_t flags) {
  return cuGetProcAddress_v2(name, function, version, flags, 0);
}
