// Whether other processes want the cores that this one computes on. A parallel region ends when its last thread does,
// and libgomp's threads spin for some 20 ms before they sleep: beside a busy process a thread that waits for a core
// would hold up all others in every region. Regions leave a core to such a process instead, and try again after a
// while.
#pragma once

#include <cstdint>

namespace lowbit {

// How many of `threads` a parallel region is to have, one or more.
int uncrowded_threads(int threads);

// Nanoseconds of a clock that only goes forward.
int64_t clock_ns();

// Says that a thread has waited for others of its region, after having worked for some time. If it was long, and the
// system says that threads of this process waited for a core meanwhile, later regions get a thread less.
void note_wait(int64_t waited_ns, int64_t worked_ns);

// For tests: nanoseconds that all threads of this process have waited for a core, ever; -1 if the system does not say.
int64_t waited_for_cores_ns();

}  // namespace lowbit
