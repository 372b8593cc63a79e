#include "core/cpu_count.h"

#include <sched.h>

#include <algorithm>
#include <fstream>
#include <set>
#include <sstream>
#include <string>

namespace gptx {
namespace {

// The CPU quota of the process's cgroup (v2, then v1), or a very large number without one.
int quota_cpus() {
  constexpr int kUnlimited = 1 << 20;
  std::string quota;
  double period = 0;
  if (std::ifstream v2("/sys/fs/cgroup/cpu.max"); v2 >> quota >> period) {
    if (quota == "max" || period <= 0) return kUnlimited;
  } else {
    std::ifstream v1_quota("/sys/fs/cgroup/cpu/cpu.cfs_quota_us");
    std::ifstream v1_period("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
    if (!(v1_quota >> quota) || !(v1_period >> period) || period <= 0) return kUnlimited;
  }
  double microseconds = 0;
  if (!(std::istringstream(quota) >> microseconds) || microseconds <= 0) return kUnlimited;
  return static_cast<int>(std::min<double>(microseconds / period, kUnlimited));
}

}  // namespace

int usable_cpus() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return 1;
  // Hardware threads of one core list the same siblings.
  std::set<std::string> cores;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    std::string siblings = std::to_string(cpu);
    std::ifstream("/sys/devices/system/cpu/cpu" + std::to_string(cpu) +
                  "/topology/thread_siblings_list") >>
        siblings;
    cores.insert(siblings);
  }
  return std::max(1, std::min(static_cast<int>(cores.size()), quota_cpus()));
}

}  // namespace gptx
