// Reports, and the signals that end a kernel: a fault in memory or arithmetic, and the time limit.
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include "machine.h"

namespace offmetal {

static void copy(uint32_t to[3], const U3& from) { to[0] = from.x, to[1] = from.y, to[2] = from.z; }

void position_of(uint32_t thread, uint32_t position[3]) {
  const U3& size = M->lanes[0].attributes.threads_per_threadgroup;
  position[0] = thread % size.x, position[1] = thread / size.x % size.y, position[2] = thread / size.x / size.y;
}

void set_name(Report* r, const char* name) { snprintf(r->name, sizeof r->name, "%s", name); }

// A new report about the current thread, or null: a place is reported once.
NOINLINE Report* report(Kind kind, uint64_t pc, const char* format, ...) {
  Launch* l = M->launch;
  for (uint32_t i = 0; i < l->n_reports; i++)
    if (l->reports[i].kind == kind && l->reports[i].pc == pc) return nullptr;
  if (l->n_reports >= kMaxReports) {
    M->stop = true;
    return nullptr;
  }
  Report* r = &l->reports[l->n_reports++];
  memset(r, 0, sizeof *r);
  r->kind = kind;
  r->pc = pc;
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(r->text, sizeof r->text, format, arguments);
  va_end(arguments);
  if (M->current) {
    copy(r->thread, M->current->attributes.thread_position_in_threadgroup);
    copy(r->group, M->current->attributes.threadgroup_position_in_grid);
  }
  if (l->n_reports >= l->max_reports) M->stop = true;
  return r;
}

// ---- signals ------------------------------------------------------------------------------------------------------

static const int kTimeUp = SIGRTMIN + 3;
static const int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, kTimeUp};
constexpr int kCount = sizeof kSignals / sizeof *kSignals;

static struct {
  struct sigaction before[kCount];
  stack_t stack_before;
  char stack[64 << 10];
  timer_t timer;
  bool timed;
  pid_t thread;
} state;

static pid_t this_thread() { return (pid_t)syscall(SYS_gettid); }

static uint64_t instruction(void* context) {
  // one behind, as a return address is
#if defined(__x86_64__)
  uint64_t pc = (uint64_t)((ucontext_t*)context)->uc_mcontext.gregs[REG_RIP] + 1;
#elif defined(__aarch64__)
  uint64_t pc = (uint64_t)((ucontext_t*)context)->uc_mcontext.pc + 1;
#endif
  return pc >= M->library && pc < M->library_end ? pc : 0;
}

static void report_fault(uint64_t pc, uintptr_t address) {
  Nearest n = nearest(address);
  if (n.name) {
    Report* r = report(kInvalidAccess, pc, "access at byte %lld of %llu bytes", (long long)n.offset,
                       (unsigned long long)n.bytes);
    if (r) set_name(r, n.name);
  } else if (M->on_stack(address)) {
    report(kInvalidAccess, pc, "stack overflow: a thread uses more than %zu KB of private memory", kStack >> 10);
  } else {
    report(kInvalidAccess, pc, "access to address %p, which is outside of every buffer", (void*)address);
  }
}

static void on_signal(int signal, siginfo_t* info, void* context) {
  if (!M->launch || this_thread() != state.thread) {  // not the kernel's: let it do what it does without us
    struct sigaction plain = {};
    plain.sa_handler = SIG_DFL;
    sigaction(signal, &plain, nullptr);
    return;
  }
  uint64_t pc = instruction(context);
  if (signal == kTimeUp)
    report(kTimeout, pc, "the kernel did not finish in time (no preemption here: a loop that waits for another thread "
                         "never ends)");
  else if (signal == SIGFPE) report(kUndefined, pc, "integer division by zero");
  else if (signal == SIGSEGV || signal == SIGBUS) report_fault(pc, (uintptr_t)info->si_addr);
  else report(kUndefined, pc, "index outside of a private or threadgroup array");  // how clang traps them
  siglongjmp(M->crash, 1);
}

void catch_signals(uint32_t timeout_ms) {
  state.thread = this_thread();
  stack_t stack = {};  // the fault may be an overflow of the one in use
  stack.ss_sp = state.stack;
  stack.ss_size = sizeof state.stack;
  sigaltstack(&stack, &state.stack_before);
  struct sigaction action = {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int i = 0; i < kCount; i++) sigaction(kSignals[i], &action, &state.before[i]);
  state.timed = false;
  if (!timeout_ms) return;
#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif
  struct sigevent event = {};
  event.sigev_notify = SIGEV_THREAD_ID;
  event.sigev_signo = kTimeUp;
  event.sigev_notify_thread_id = state.thread;
  struct itimerspec limit = {};
  limit.it_value.tv_sec = timeout_ms / 1000;
  limit.it_value.tv_nsec = (long)(timeout_ms % 1000) * 1000000;
  state.timed = !timer_create(CLOCK_MONOTONIC, &event, &state.timer);
  if (state.timed) timer_settime(state.timer, 0, &limit, nullptr);
}

void restore_signals() {
  if (state.timed) timer_delete(state.timer);
  for (int i = 0; i < kCount; i++) sigaction(kSignals[i], &state.before[i], nullptr);
  sigaltstack(&state.stack_before, nullptr);
}

}  // namespace offmetal
