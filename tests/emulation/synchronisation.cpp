// Barriers of blocks and clusters, and the collective operations of a warp.

#include <utility>

#include "emulator.h"

namespace emulation {
namespace {

unsigned first_slot_of_cluster() { return running / kMaxThreads / cluster_size * cluster_size; }

void release(unsigned slot, Wait wait) {
  auto& fibers = resident[slot]->fibers;
  for (unsigned i = 0; i < fibers.size(); ++i) {
    if (fibers[i].wait != wait) continue;
    fibers[i].wait = Wait::kNone;
    make_ready(slot * kMaxThreads + i);
  }
}

}  // namespace

void release_barriers() {
  Block& b = block();
  if (b.at_barrier && b.at_barrier == b.alive) {
    b.at_barrier = 0;
    release(running / kMaxThreads, Wait::kBlock);
  }
  const unsigned first = first_slot_of_cluster();
  unsigned alive = 0, arrived = 0;
  for (unsigned slot = first; slot < first + cluster_size; ++slot) {
    alive += resident[slot]->alive;
    arrived += resident[slot]->at_cluster_barrier;
  }
  if (!arrived || arrived < alive) return;
  for (unsigned slot = first; slot < first + cluster_size; ++slot) {
    resident[slot]->at_cluster_barrier = 0;
    for (Fiber& arrived_fiber : resident[slot]->fibers)
      if (arrived_fiber.cluster_barrier == ClusterBarrier::kArrived)
        arrived_fiber.cluster_barrier = ClusterBarrier::kComplete;
    release(slot, Wait::kCluster);
  }
}

void release_collectives() {
  const unsigned first = running / kWarpThreads * kWarpThreads;
  auto& unfinished = warp().unfinished;
  for (auto entry = unfinished.begin(); entry != unfinished.end();) {
    const Lanes& lanes = entry->second.lanes;
    if ((entry->first & warp().alive) != lanes.mask) {
      ++entry;
      continue;
    }
    for (unsigned lane = 0; lane < kWarpThreads; ++lane) {
      if (!(lanes.mask >> lane & 1)) continue;
      fiber_of(first + lane).gathered = lanes;
      make_ready(first + lane);
    }
    entry = unfinished.erase(entry);
  }
}

std::string describe_waiting(const Block& b) {
  std::string waiting = std::to_string(b.at_barrier) + " of " + std::to_string(b.alive) + " threads at a barrier";
  if (b.at_cluster_barrier) waiting += ", " + std::to_string(b.at_cluster_barrier) + " at the cluster's";
  for (const Warp& w : b.warps)
    for (const auto& [mask, collective] : w.unfinished) waiting += std::string(", a warp at ") + collective.operation;
  return "block " + std::to_string(b.index.x) + ": " + waiting;
}

void block_barrier() {
  make_unready(running);
  fiber().wait = Wait::kBlock;
  ++block().at_barrier;
  release_barriers();
  suspend();
}
void cluster_barrier() {
  cluster_arrive();
  cluster_wait();
}

void cluster_arrive() {
  if (fiber().cluster_barrier != ClusterBarrier::kNone) fail("a thread arrives twice at the barrier of the cluster");
  fiber().cluster_barrier = ClusterBarrier::kArrived;
  ++block().at_cluster_barrier;
  release_barriers();
}

void cluster_wait() {
  if (fiber().cluster_barrier == ClusterBarrier::kNone)
    fail("a thread waits at the barrier of the cluster without having arrived");
  if (fiber().cluster_barrier == ClusterBarrier::kArrived) {
    make_unready(running);
    fiber().wait = Wait::kCluster;
    suspend();
  }
  fiber().cluster_barrier = ClusterBarrier::kNone;
}

unsigned cluster_blocks() { return cluster_size; }
unsigned cluster_rank() { return running / kMaxThreads % cluster_size; }
unsigned lane() { return running % kWarpThreads; }

Lanes gather_lanes(unsigned mask, const char* operation, uint64_t bits) {
  if (!(mask >> lane() & 1)) fail("%s: lane %u is not in its own mask %08x", operation, lane(), mask);
  auto [entry, is_first] = warp().unfinished.try_emplace(mask, Collective{operation, {}});
  Collective& collective = entry->second;
  if (std::string(collective.operation) != operation)
    fail("lanes of one warp meet at different operations: %s and %s", collective.operation, operation);
  collective.lanes.bits[lane()] = bits;
  collective.lanes.mask |= 1u << lane();
  make_unready(running);
  release_collectives();
  suspend();
  return fiber().gathered;
}

}  // namespace emulation
