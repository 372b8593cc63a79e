// How many threads the process may use.
#pragma once

namespace gptx {

// The least of the CPUs this process may run on, its cgroup's CPU quota rounded down, and the
// physical cores among those CPUs; at least 1.
int usable_cpus();

}  // namespace gptx
