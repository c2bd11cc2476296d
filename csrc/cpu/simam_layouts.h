// simam over maps whose planes do not lie in one piece of eight or more values: what simam.cpp hands over.
#pragma once

#include "hashengine/simam.h"

namespace hashengine {

// Planes side by side, eight or more: simam_channels_last.cpp.
template <typename Element>
void simam_forward_channels_last(const SimamForward& params, SimdLevel level, const ThreadPool& pool);
template <typename Element>
void simam_backward_channels_last(const SimamBackward& params, SimdLevel level, const ThreadPool& pool);

// Fewer than eight values in a row, whatever the row: simam_packed.cpp.
template <typename Element>
void simam_forward_packed(const SimamForward& params, SimdLevel level, const ThreadPool& pool);
template <typename Element>
void simam_backward_packed(const SimamBackward& params, SimdLevel level, const ThreadPool& pool);

}  // namespace hashengine
