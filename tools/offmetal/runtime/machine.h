// The machine that kernels run on: what its parts share.
//
//   fibers.cpp   one fiber per thread of a threadgroup; who runs next; barriers
//   simd.cpp     what a SIMD-group computes together
//   memory.cpp   every load and store of a checked kernel: bounds, races, uninitialised memory
//   accesses.cpp where kernels enter: the compiler's callbacks, atomics, threadgroup variables
//   faults.cpp   reports, signals, the time limit
//   launch.cpp   a dispatch from its first to its last threadgroup
#pragma once
#include <csetjmp>
#include <cstddef>
#include <cstdint>

#define API extern "C" __attribute__((visibility("default")))
#define NOINLINE __attribute__((noinline))
#define CALLER ((uint64_t)__builtin_return_address(0))

namespace offmetal {

constexpr uint32_t kMaxThreads = 1024, kSimd = 32, kMaxGroups = kMaxThreads / kSimd;
constexpr uint32_t kMaxBuffers = 31, kMaxVariables = 64;
constexpr size_t kPage = 4096, kStack = 256 << 10;
constexpr uint32_t kThreadgroupLimit = 32768;
// Memory for threadgroup variables: more than the limit, as each has unused bytes before it.
constexpr size_t kThreadgroupSpace = 256 << 10;
// Inaccessible memory around that and around buffers: what a 32-bit index of 4-byte elements can reach.
constexpr size_t kGuard = (size_t)1 << 34;

// ---- shared with machine.py ---------------------------------------------------------------------------------------

enum Kind : int32_t {
  kOutOfBounds = 1, kRace, kUninitialised, kBarrierDivergence, kInactiveLane, kThreadgroupMemory, kInvalidAccess,
  kTimeout, kUndefined
};
enum Check : uint32_t { kCheckMemory = 1, kCheckRaces = 2, kCheckUninitialised = 4 };
enum BufferFlag : uint32_t { kOutput = 1, kInitialised = 2 };
enum Order : uint32_t { kAscending, kDescending, kRandom };

struct Report {
  int32_t kind;
  int32_t write;  // of a race: bit 0 this thread writes, bit 1 the other one did
  uint64_t pc, other_pc;
  uint32_t thread[3], group[3], other_thread[3];
  uint32_t other_group;  // serial number in the grid, from 0
  uint64_t offset;
  char name[64], text[128];
};
constexpr uint32_t kMaxReports = 16;

struct Buffer {
  void* host;
  uint64_t bytes, origin;  // the kernel's pointer points `origin` bytes behind the start
  uint32_t element, flags;
  const char* name;
  uint64_t read_bytes, written_bytes, lines;  // results of a checked launch; lines of 128 bytes
};

struct alignas(16) U3 { uint32_t x, y, z, pad; };

// As signature.py declares it to kernels.
struct Attributes {
  U3 dispatch_threads_per_threadgroup, grid_origin, grid_size, thread_position_in_grid, thread_position_in_threadgroup,
      threadgroup_position_in_grid, threadgroups_per_grid, threads_per_grid, threads_per_threadgroup;
  uint32_t dispatch_quadgroups_per_threadgroup, dispatch_simdgroups_per_threadgroup, quadgroup_index_in_threadgroup,
      quadgroups_per_threadgroup, simdgroup_index_in_threadgroup, simdgroups_per_threadgroup, thread_execution_width,
      thread_index_in_quadgroup, thread_index_in_simdgroup, thread_index_in_threadgroup, threads_per_simdgroup;
};

struct Launch {
  void (*entry)(const uint64_t* buffers, const Attributes*);
  Buffer* buffers;
  uint32_t n_buffers, checks;
  uint32_t grid[3], threadgroup[3];
  uint32_t order, seed, timeout_ms, max_reports;
  // results
  uint32_t n_reports, threadgroup_bytes;
  uint64_t simd_ops, divergent_ops, barriers, threads, benign_writes, unwritten, unwritten_index;
  char unwritten_name[64];
  uint64_t base;  // where the kernel's library is loaded
  Report reports[kMaxReports];
};

// ---- threads ------------------------------------------------------------------------------------------------------

enum State : uint8_t { kReady, kAtSimd, kAtBarrier, kDone };
enum Operation : uint8_t { kReduce, kShuffle, kVote, kMultiply, kSimdBarrier, kThreadgroupBarrier };

struct Lane {
  void* sp;
  char* stack_top;
  void** frame;   // of the runtime function that the lane waits in
  uint64_t site;  // hash of the chain of return addresses: lanes with the same one execute together
  const void *in, *in2, *in3;  // operands of the operation
  void* out;
  uint32_t a, b, c, d;
  uint64_t result;
  uint32_t index, lane, group;  // in the threadgroup, in the SIMD-group, of the SIMD-group
  State state;
  Operation operation;
  Attributes attributes;

  uint64_t caller() const { return (uint64_t)frame[1]; }
};

// ---- memory -------------------------------------------------------------------------------------------------------

// Who touched an element last: of threadgroup memory each byte, of an output each element of at most 4 bytes.
struct Cell {
  uint32_t w_tg, w_epoch;        // last write: serial number of the threadgroup from 1, its barriers so far
  uint32_t r_tg, r_epoch;        // reads since that barrier
  uint32_t w_pc, r_pc;           // behind the base of the library
  uint32_t r_groups;             // SIMD-groups that read
  uint16_t w_thread, r_thread;
  uint16_t w_simd_epoch, r_simd_epoch;  // simdgroup barriers so far
  uint8_t w_atomic, r_atomic, r_several;
};

// A buffer in the arena: its end lies at the end of a page, with inaccessible memory behind and before it.
struct Region {
  uintptr_t base, end;
  Cell* cells;      // of outputs
  uint8_t* lines;   // touched ones, of 128 bytes
  uint32_t shift, flags;  // log2 of the bytes of a cell
  const char* name;
  uint64_t read_bytes, written_bytes;
};

struct Variable {  // of the threadgroup
  uint32_t id, offset, bytes;
  const char* name;
};

// A write of a place that another thread wrote: judged once it has happened, by the value.
struct PendingWrite {
  bool on, between_groups;
  uint32_t size;
  uintptr_t address;
  char before[16];
  Cell cell;
  const char* name;
  uint64_t offset, pc;
  Lane* lane;
};

struct Machine {
  Launch* launch;
  bool stop;  // fibers leave at their next call
  // threads
  char* stacks;
  Lane lanes[kMaxThreads];
  Lane* current;
  void* scheduler_sp;
  uint32_t n_threads, n_groups, n_alive;
  uint32_t ready[kMaxGroups], alive[kMaxGroups], all[kMaxGroups];  // masks of lanes
  uint64_t random;
  // barriers passed, by the memory that they order
  uint32_t threadgroup_epoch, device_epoch, simd_epoch[kMaxGroups];
  uint32_t serial;  // of the threadgroup, from 1
  // memory
  char* threadgroup_memory;
  Cell* threadgroup_cells;
  Variable variables[kMaxVariables];
  uint32_t n_variables, threadgroup_used, threadgroup_bytes;
  Region regions[kMaxBuffers];
  uint32_t n_regions, slot_shift;
  uintptr_t arena, arena_end;
  uint64_t arguments[kMaxBuffers];
  uintptr_t library, library_end;
  PendingWrite pending;
  sigjmp_buf crash;

  bool on_stack(uintptr_t a) const { return a - (uintptr_t)stacks < (size_t)kMaxThreads * kStack; }
  bool near_threadgroup(uintptr_t a) const {
    return a - (uintptr_t)threadgroup_memory + kGuard < kThreadgroupSpace + 2 * kGuard;
  }
  bool in_arena(uintptr_t a) const { return a - arena < arena_end - arena; }
};
extern Machine* M;

// fibers.cpp
[[noreturn]] void leave_fiber();
void arrive(Lane* lane, Operation operation, void* frame);  // before operands are set
void wait(Lane* lane, State state);
void prepare_fiber(Lane* lane);
void run_threadgroup();

// simd.cpp
void execute(Lane* lanes, uint32_t mask, const Lane& first);

// memory.cpp
void access(uintptr_t address, uint32_t size, bool write, bool atomic, uint64_t pc);
void flush_pending();
struct Nearest {
  const char* name;  // null: not near any memory of the kernel
  int64_t offset;
  uint64_t bytes;
};
Nearest nearest(uintptr_t address);

// faults.cpp
Report* report(Kind kind, uint64_t pc, const char* format, ...) __attribute__((format(printf, 3, 4)));
void set_name(Report* r, const char* name);
void position_of(uint32_t thread, uint32_t position[3]);
void catch_signals(uint32_t timeout_ms);
void restore_signals();

inline void leave_if_stopped() {
  if (__builtin_expect(M->stop, 0)) leave_fiber();
}

}  // namespace offmetal
