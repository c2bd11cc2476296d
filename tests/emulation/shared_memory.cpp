// Shared memory, of a block and of its cluster, and the asynchronous copies into it.

#include <link.h>

#include <algorithm>

#include "emulator.h"

namespace emulation {

Block* in_place;

namespace {

// The thread-local storage of this module, which is where __shared__ variables live, for the calling thread.
struct Span {
  char* data;
  size_t size;

  bool contains(const char* address) const { return data <= address && address < data + size; }
};
thread_local char inside_declared_memory = 0;
Span find_declared_memory() {
  Span span{&inside_declared_memory, 0};  // taking its address also makes the loader allocate the storage
  dl_iterate_phdr(
      [](dl_phdr_info* module, size_t, void* argument) {
        auto* span = static_cast<Span*>(argument);
        auto* begin = static_cast<char*>(module->dlpi_tls_data);
        for (int i = 0; begin && i < module->dlpi_phnum; ++i) {
          const size_t size = module->dlpi_phdr[i].p_memsz;
          if (module->dlpi_phdr[i].p_type == PT_TLS && Span{begin, size}.contains(span->data)) {
            *span = {begin, size};
            return 1;
          }
        }
        return 0;
      },
      &span);
  return span;
}

Span declared_memory;  // where the __shared__ variables of the running block lie

Span dynamic_memory(const Block& block) { return {block.dynamic.get(), dynamic_bytes}; }

void complete(const std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    std::copy_n(copy.source, copy.bytes - copy.zeros, copy.target);
    std::fill_n(copy.target + copy.bytes - copy.zeros, copy.zeros, 0);
  }
}

}  // namespace

void allocate_shared_memory(Block& block) {
  declared_memory = find_declared_memory();
  block.declared.resize(declared_memory.size);
  block.dynamic.reset(new char[dynamic_bytes]);  // of exactly this size, so that the sanitizer sees its end
}

void begin_shared_memory(Block& block) {
  std::fill(block.declared.begin(), block.declared.end(), kPoison);
  std::fill_n(block.dynamic.get(), dynamic_bytes, kPoison);
}

void end_shared_memory(Block& block) {
  in_place = nullptr;  // it was this block's, and is not saved
  if (cluster_size == 1) return;
  begin_shared_memory(block);
  ASAN_POISON_MEMORY_REGION(block.declared.data(), block.declared.size());
  ASAN_POISON_MEMORY_REGION(block.dynamic.get(), dynamic_bytes);
}

void put_in_place(Block& block) {
  if (in_place == &block) return;
  if (in_place) std::copy_n(declared_memory.data, declared_memory.size, in_place->declared.data());
  std::copy_n(block.declared.data(), declared_memory.size, declared_memory.data);
  in_place = &block;
}

void* dynamic_shared_memory() { return block().dynamic.get(); }

void* map_shared(const void* address, unsigned rank) {
  if (rank >= cluster_size) fail("map_shared_rank: block %u of a cluster of %u", rank, cluster_size);
  Block& peer = *resident[running / kMaxThreads / cluster_size * cluster_size + rank];
  if (!peer.alive) fail("map_shared_rank: block %u of the cluster has exited", rank);
  const auto* byte = static_cast<const char*>(address);
  const Span dynamic = dynamic_memory(block());
  if (dynamic.contains(byte)) return peer.dynamic.get() + (byte - dynamic.data);
  if (!declared_memory.contains(byte)) fail("map_shared_rank: the address is not in this block's shared memory");
  // While this block runs its own variables are in place, and a peer's are not.
  return (&peer == &block() ? declared_memory.data : peer.declared.data()) + (byte - declared_memory.data);
}

void copy_later(void* shared, const void* global, size_t bytes, size_t zeros) {
  auto* target = static_cast<char*>(shared);
  if ((bytes != 4 && bytes != 8 && bytes != 16) || zeros > bytes)
    fail("__pipeline_memcpy_async: %zu bytes with %zu zeros; 4, 8 or 16 can be copied", bytes, zeros);
  if (reinterpret_cast<uintptr_t>(shared) % bytes || reinterpret_cast<uintptr_t>(global) % bytes)
    fail("__pipeline_memcpy_async: an address is not a multiple of %zu", bytes);
  if (!dynamic_memory(block()).contains(target) && !declared_memory.contains(target))
    fail("__pipeline_memcpy_async: the target is not in this block's shared memory");
  std::fill_n(target, bytes, kPoison);
  fiber().issued.push_back({target, static_cast<const char*>(global), bytes, zeros});
}

void commit_copies() {
  fiber().committed.push_back(std::move(fiber().issued));
  fiber().issued.clear();
}

void wait_for_copies(size_t batches_left) {
  auto& batches = fiber().committed;
  for (; batches.size() > batches_left; batches.pop_front()) complete(batches.front());
}

}  // namespace emulation
