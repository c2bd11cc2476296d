// simam for the layouts that simam.cpp does not compute itself: all but contiguous planes of eight or more values.
#pragma once

#include "hashengine/simam.h"

namespace hashengine {

// channels_last with eight or more channels: channels_last.cpp.
template <typename Element>
void simam_forward_channels_last(const SimamForward& params, SimdLevel level, const ThreadPool& pool);
template <typename Element>
void simam_backward_channels_last(const SimamBackward& params, SimdLevel level, const ThreadPool& pool);

// Contiguous planes of fewer than eight values, and channels_last with fewer than eight channels: packed.cpp.
template <typename Element>
void simam_forward_packed(const SimamForward& params, SimdLevel level, const ThreadPool& pool);
template <typename Element>
void simam_backward_packed(const SimamBackward& params, SimdLevel level, const ThreadPool& pool);

}  // namespace hashengine
