// PyTorch's allocator on a CPU, for training: large blocks come from one arena, best fit, and stay in it when freed.
//
// A training step takes and frees the same megabytes again and again. The C library either maps every large block anew,
// whose pages are faulted in and zeroed each time, or keeps them in a heap that finds no place for an aligned block
// where one of its size was, so that a step holds up to twice what is alive. Here a freed block joins its neighbours and
// is taken again, and pages may be huge.

#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstdint>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

namespace {

constexpr size_t kAlign = 64;                  // what PyTorch's kernels expect of a block: a line of the cache
constexpr size_t kSmallest = size_t{1} << 16;  // smaller blocks are left to the C library
constexpr size_t kHugePage = size_t{1} << 21;

// Blocks of one stretch of addresses, which costs no memory until it is written to.
class Arena {
 public:
  explicit Arena(size_t size) : size_(size) {
    void* start = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) return;
    start_ = reinterpret_cast<uintptr_t>(start);
#ifdef MADV_HUGEPAGE
    madvise(start, size, MADV_HUGEPAGE);
#endif
    add_free((start_ + kHugePage - 1) & ~(kHugePage - 1), start_ + size);
  }

  bool works() const { return start_ != 0; }
  bool owns(const void* block) const { return reinterpret_cast<uintptr_t>(block) - start_ < size_; }

  // The lowest of the smallest free blocks that n bytes fit into; null if there is none.
  // One line of the cache more than is needed goes with them: blocks of whole pages side by side would begin at the same
  // place of a page, and a processor that knows addresses by their low 12 bits has reads of the one wait for writes to
  // the other.
  void* take(size_t n) {
    if (n > size_) return nullptr;  // a negative size is a huge one, and rounding up would begin at 0 again
    n = ((n + kAlign - 1) & ~(kAlign - 1)) + kAlign;
    std::lock_guard<std::mutex> hold(mutex);
    const auto found = by_size_.lower_bound({n, 0});
    if (found == by_size_.end()) return nullptr;
    const auto [size, start] = *found;
    remove_free(start, start + size);
    if (size > n) add_free(start + n, start + size);
    taken_[start] = n;
    return reinterpret_cast<void*>(start);
  }

  void give(void* block) {
    std::lock_guard<std::mutex> hold(mutex);
    const auto found = taken_.find(reinterpret_cast<uintptr_t>(block));
    uintptr_t start = found->first, end = start + found->second;
    taken_.erase(found);
    const auto after = free_.lower_bound(start);
    const auto before = after == free_.begin() ? free_.end() : std::prev(after);
    const bool joins_after = after != free_.end() && after->first == end;
    const bool joins_before = before != free_.end() && before->second == start;
    const uintptr_t last = joins_after ? after->second : end;
    const uintptr_t first = joins_before ? before->first : start;
    if (joins_after) remove_free(end, last);
    if (joins_before) remove_free(first, start);
    add_free(first, last);
  }

  // Returns the whole pages of free blocks to the system.
  void trim() {
    std::lock_guard<std::mutex> hold(mutex);
    const uintptr_t page = sysconf(_SC_PAGESIZE);
    for (const auto& [start, end] : free_) {
      const uintptr_t first = (start + page - 1) & ~(page - 1), last = end & ~(page - 1);
      if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
    }
  }

  std::mutex mutex;

 private:
  void add_free(uintptr_t start, uintptr_t end) {
    free_.emplace(start, end);
    by_size_.emplace(end - start, start);
  }
  void remove_free(uintptr_t start, uintptr_t end) {
    free_.erase(start);
    by_size_.erase({end - start, start});
  }

  uintptr_t start_ = 0;
  size_t size_;
  std::map<uintptr_t, uintptr_t> free_;             // start to end
  std::set<std::pair<size_t, uintptr_t>> by_size_;  // the same: size, start
  std::unordered_map<uintptr_t, size_t> taken_;     // start to size
};

// Whether addresses that nothing is written to are counted, and the arena would leave none to others: by a limit of this
// process (ulimit -v, -d), or by a system that promises no more memory than it has.
bool addresses_are_counted() {
  for (const auto kind : {RLIMIT_AS, RLIMIT_DATA}) {
    rlimit limit;
    if (getrlimit(kind, &limit) != 0 || limit.rlim_cur != RLIM_INFINITY) return true;
  }
  std::ifstream file("/proc/sys/vm/overcommit_memory");
  int mode = 0;
  return file >> mode && mode == 2;
}

// As large as the machine's memory; never destroyed, for blocks outlive whatever could destroy it.
Arena& arena() {
  static Arena* const made = new Arena(sysconf(_SC_PHYS_PAGES) * static_cast<size_t>(sysconf(_SC_PAGESIZE)));
  return *made;
}

void release(void* block) {
  if (!block) return;
  if (!arena().owns(block)) return c10::GetDefaultCPUAllocator()->raw_deleter()(block);
  c10::profiledCPUMemoryReporter().Delete(block);
  arena().give(block);
}

class ArenaAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t n) override {
    void* block = n < kSmallest ? nullptr : arena().take(n);
    if (block) {
      c10::profiledCPUMemoryReporter().New(block, n);
    } else {
      block = c10::GetDefaultCPUAllocator()->raw_allocate(n);
    }
    return {block, block, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }
};

}  // namespace

// Makes the arena PyTorch's allocator on the CPU; false where the system gives it no addresses, or counts them. What was
// allocated before goes back to where it came from.
extern "C" bool bpo_fast_use_arena() {
  if (addresses_are_counted() || !arena().works()) return false;
  static ArenaAllocator* const allocator = new ArenaAllocator;
  // a child of fork() finds the lock as nobody's
  pthread_atfork([] { arena().mutex.lock(); }, [] { arena().mutex.unlock(); }, [] { arena().mutex.unlock(); });
  c10::SetCPUAllocator(allocator, 1);
  return true;
}

extern "C" void bpo_fast_trim_arena() { arena().trim(); }
