// The shared memory of the blocks of a cluster, and asynchronous copies into it.

#include <link.h>

#include <algorithm>

#include "emulator.h"
#include "matrix_instructions.h"

namespace emulation {

Block* swapped_in;

namespace {

constexpr uint32_t kReservedBytes = 1024;  // an H200 reserves the first bytes of each block's shared memory

struct Span {
  char* data;
  size_t size;

  bool contains(const char* address) const { return data <= address && address < data + size; }
};
thread_local char inside_declared_memory = 0;

// Returns the calling thread's copy of this module's thread-local storage, which contains the __shared__ variables.
Span find_declared_memory() {
  Span span{&inside_declared_memory, 0};  // taking the variable's address makes the loader allocate the storage
  dl_iterate_phdr(
      [](dl_phdr_info* module, size_t, void* argument) {
        auto* found = static_cast<Span*>(argument);
        auto* begin = static_cast<char*>(module->dlpi_tls_data);
        for (int i = 0; begin && i < module->dlpi_phnum; ++i) {
          const size_t size = module->dlpi_phdr[i].p_memsz;
          if (module->dlpi_phdr[i].p_type == PT_TLS && Span{begin, size}.contains(found->data)) {
            *found = {begin, size};
            return 1;
          }
        }
        return 0;
      },
      &span);
  return span;
}

Span declared_memory;  // the __shared__ variables of the running block

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
  block.dynamic.reset(new char[dynamic_bytes]);  // exactly this size, so that AddressSanitizer detects overruns
}

void begin_shared_memory(Block& block) {
  std::fill(block.declared.begin(), block.declared.end(), kPoison);
  std::fill_n(block.dynamic.get(), dynamic_bytes, kPoison);
}

void end_shared_memory(Block& block) {
  swapped_in = nullptr;  // the block was swapped in; its variables are no longer needed
  if (cluster_size == 1) return;
  begin_shared_memory(block);
  ASAN_POISON_MEMORY_REGION(block.declared.data(), block.declared.size());
  ASAN_POISON_MEMORY_REGION(block.dynamic.get(), dynamic_bytes);
}

void swap_in(Block& block) {
  if (swapped_in == &block) return;
  if (swapped_in) std::copy_n(declared_memory.data, declared_memory.size, swapped_in->declared.data());
  std::copy_n(block.declared.data(), declared_memory.size, declared_memory.data);
  swapped_in = &block;
}

void swap_out() {
  if (swapped_in) std::copy_n(declared_memory.data, declared_memory.size, swapped_in->declared.data());
  swapped_in = nullptr;
}

uint32_t shared_address(const void* variable) {
  const Span dynamic = dynamic_memory(block());
  const auto* byte = static_cast<const char*>(variable);
  if (!dynamic.contains(byte)) fail("the address is not in this block's dynamic shared memory");
  return uint32_t(byte - dynamic.data) + kReservedBytes;
}

const uint32_t* at_shared_address(uint32_t address, size_t bytes) {
  if (address < kReservedBytes || address + bytes > kReservedBytes + dynamic_bytes)
    fail("a read at %u is outside of the block's dynamic shared memory", address);
  return reinterpret_cast<const uint32_t*>(block().dynamic.get() + (address - kReservedBytes));
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
  // Only the running block's variables are swapped in.
  return (&peer == &block() ? declared_memory.data : peer.declared.data()) + (byte - declared_memory.data);
}

void copy_later(void* shared, const void* global, size_t bytes, size_t zeros) {
  auto* target = static_cast<char*>(shared);
  if ((bytes != 4 && bytes != 8 && bytes != 16) || zeros > bytes)
    fail("__pipeline_memcpy_async: the size must be 4, 8 or 16 bytes, got %zu with %zu zeros", bytes, zeros);
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
