/* The fibres behind emulation.h. A dispatcher resumes the unfinished threads of a block: forwards, all in turn, or
 * backwards, the last block first and one warp after the other as far as it comes. Results that depend on the order betray
 * a missing barrier. Blocks run one after the other, or, where they are launched to run together, each in a thread of the
 * host until it waits for others: then it is the next one's turn. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "abi.h"
#include "emulation.h"

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace emulation {

enum { STACK = 256 << 10, LANES = 32 };

struct barrier {
    int arrived, members;
    unsigned epoch;
};

struct warp {
    struct barrier barrier;
    alignas(16) char slots[2][LANES][SLOT]; /* two, so that one wait an exchange is enough */
};

struct copy {
    void *to;
    const void *from;
    int bytes, group;
};

struct thread {
    dim3 index;
    int number;
    bool started, finished;
    unsigned exchanges;
    char *stack;
    struct warp *warp;
    std::vector<copy> copies;
    int groups;
#ifdef __x86_64__
    void *context;
#else
    ucontext_t context;
#endif
};

thread *self;
dim3 thread_index, block_index, block_size, grid_size;
char *dynamic_shared;

static thread_local std::vector<thread> threads;
static thread_local std::vector<warp> warps;
static std::vector<char *> free_stacks;
static thread_local barrier block_barrier, first_threads_barrier;
static thread_local int64_t idle;     /* turns since a thread last arrived anywhere */
static thread_local int64_t arrivals; /* at a barrier or at the end */
static const char *error;
static void (*kernel)(const void *);
static const void *arguments;

#ifdef __x86_64__
static thread_local void *dispatcher;
extern "C" void emulation_switch(void **from, void *to);
asm(".text\n.globl emulation_switch\n.hidden emulation_switch\nemulation_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp, (%rdi)\nmov %rsi, %rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");
static void resume(thread &t) { emulation_switch(&dispatcher, t.context); }
static void leave(thread &t) { emulation_switch(&t.context, dispatcher); }
static void prepare(thread &t, void (*run)())
{
    void **top = (void **)(t.stack + STACK);
    top[-2] = (void *)run; /* where the switch returns to; above it the stack is as after a call */
    t.context = top - 8;
}
#else
static thread_local ucontext_t dispatcher;
static void resume(thread &t) { swapcontext(&dispatcher, &t.context); }
static void leave(thread &t) { swapcontext(&t.context, &dispatcher); }
static void prepare(thread &t, void (*run)())
{
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack;
    t.context.uc_stack.ss_size = STACK;
    makecontext(&t.context, run, 0);
}
#endif

void stop(const char *why)
{
    error = error ? error : why;
    leave(*self); /* for good: the dispatcher resumes nobody after an error */
}

void yield()
{
    if (++idle > 4 * (int64_t)threads.size())
        stop("threads wait for each other for ever");
    leave(*self);
}

void progress()
{
    idle = 0;
    arrivals++;
}

static void release(barrier &b)
{
    b.arrived = 0;
    b.epoch++;
}

static void wait(barrier &b)
{
    unsigned epoch = b.epoch;
    progress();
    if (++b.arrived == b.members)
        release(b);
    while (b.epoch == epoch)
        yield();
}

void wait_for_block() { wait(block_barrier); }
void wait_for_threads(int count)
{
    if (first_threads_barrier.arrived == 0)
        first_threads_barrier.members = count;
    if (self->number >= count || count % LANES || first_threads_barrier.members != count)
        stop("a barrier that not the first threads come to, or not all for as many");
    wait(first_threads_barrier);
}
void wait_for_warp()
{
    if (self->warp->barrier.members != LANES)
        stop("a warp operation without all lanes");
    wait(self->warp->barrier);
}

int thread_number() { return self->number; }
int lane() { return self->number % LANES; }

const char *exchange(const void *mine, size_t size)
{
    auto &slots = self->warp->slots[self->exchanges++ % 2];
    memcpy(slots[lane()], mine, size);
    wait_for_warp();
    return slots[0];
}

void add_copy(void *to, const void *from, int bytes)
{
    if ((uintptr_t)to % 16 || (bytes && (uintptr_t)from % 16))
        stop("a copy of a line that is not aligned");
    memset(to, 0xff, 16); /* NaN until it has been waited for */
    self->copies.push_back({to, from, bytes, self->groups});
}
void end_copies() { self->groups++; }
void finish_copies(int but)
{
    auto arrived = [&](const copy &c) {
        if (c.group >= self->groups - but)
            return false;
        memset(c.to, 0, 16);
        memcpy(c.to, c.from, (size_t)c.bytes);
        return true;
    };
    auto &copies = self->copies;
    copies.erase(std::remove_if(copies.begin(), copies.end(), arrived), copies.end());
}

float dot_of_pairs(const char *slots, int row, int column, float (*widen)(uint16_t))
{
    float sum = 0.0f;
    for (int k = 0; k < 16; k++) {
        uint32_t a, b;
        int t = k % 8 / 2, upper = k / 8;
        memcpy(&a, slots + (row % 8 * 4 + t) * SLOT + (row / 8 + 2 * upper) * 4, 4);
        memcpy(&b, slots + (column * 4 + t) * SLOT + (4 + upper) * 4, 4);
        sum += widen((uint16_t)(a >> k % 2 * 16)) * widen((uint16_t)(b >> k % 2 * 16));
    }
    return sum;
}

static void leave_barrier(barrier &b)
{
    if (--b.members > 0 && b.arrived == b.members)
        release(b);
}

static void run_thread()
{
    kernel(arguments);
    if (!self->copies.empty())
        error = error ? error : "a thread ended without waiting for its copies";
    progress();
    self->finished = true;
    leave_barrier(block_barrier);
    leave_barrier(self->warp->barrier);
    leave(*self);
}

static char *new_stack()
{
    if (free_stacks.empty()) {
        void *memory = mmap(NULL, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED)
            abort();
        return (char *)memory;
    }
    char *stack = free_stacks.back();
    free_stacks.pop_back();
    return stack;
}

static void take_turn(thread &t)
{
    if (!t.started) {
        t.started = true;
        t.stack = new_stack();
        prepare(t, run_thread);
    }
    self = &t;
    thread_index = t.index;
    resume(t);
    if (t.finished)
        free_stacks.push_back(t.stack);
}

static void run_block(bool backwards)
{
    int count = (int)(block_size.x * block_size.y * block_size.z), left = count;
    threads.resize(count);
    warps.resize((count + LANES - 1) / LANES);
    for (int w = 0; w < (int)warps.size(); w++)
        warps[w].barrier = {0, std::min((int)LANES, count - w * LANES), 0};
    block_barrier = {0, count, 0}, first_threads_barrier = {};
    begin_block_on_hopper(count);
    idle = 0;
    for (int i = 0; i < count; i++) {
        thread &t = threads[i];
        t.index = {i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y};
        t.number = i, t.started = t.finished = false, t.exchanges = 0, t.warp = &warps[i / LANES], t.groups = 0;
        t.copies.clear();
    }
    int together = backwards ? LANES : count;
    while (left && !error)
        for (int first = 0; first < count && !error; first += together)
            for (int64_t before = arrivals - 1; before != arrivals && !error;) {
                before = arrivals;
                for (int i = first; i < std::min(first + together, count) && !error; i++) {
                    thread &t = threads[backwards ? count - 1 - i : i];
                    if (!t.finished) {
                        take_turn(t);
                        left -= t.finished;
                    }
                }
            }
    error = error ? error : end_block_on_hopper();
}

/* Blocks that run together take turns. */
static struct {
    std::mutex mutex;
    std::condition_variable passed;
    std::vector<bool> running;
    int turn, step, waits; /* whose; to whose it goes; how often since one got on */
} together;

/* Lets the next block that is still running go on. */
static void pass_turn(std::unique_lock<std::mutex> &lock, bool end)
{
    int count = (int)together.running.size(), mine = together.turn;
    together.running[mine] = !end;
    for (int i = 0; i < count && (i == 0 || !together.running[together.turn]); i++)
        together.turn = (together.turn + together.step + count) % count;
    together.passed.notify_all();
    if (!end)
        together.passed.wait(lock, [&] { return together.turn == mine; });
}

void wait_for_change(const unsigned *word, unsigned before, unsigned bit)
{
    while (((*word ^ before) & bit) == 0) {
        if (error || ++together.waits > 2 * (int)together.running.size())
            stop("blocks wait for each other for ever");
        std::unique_lock<std::mutex> lock(together.mutex);
        thread *waiting = self;
        char *shared = dynamic_shared;
        dim3 block = block_index;
        pass_turn(lock, false);
        self = waiting, thread_index = waiting->index, block_index = block, dynamic_shared = shared;
    }
    together.waits = 0;
}

static void start_block(uint64_t b, dim3 grid, uint32_t size, uint32_t shared_bytes, bool backwards)
{
    std::vector<uint4> shared(shared_bytes / 16 + 1);
    dynamic_shared = (char *)shared.data();
    memset(dynamic_shared, 0xff, shared.size() * 16); /* NaN until it is written */
    block_size = {size, 1, 1}, grid_size = grid;
    block_index = {(unsigned)(b % grid.x), (unsigned)(b / grid.x % grid.y), (unsigned)(b / grid.x / grid.y)};
    run_block(backwards);
}

static void start_together(int count, uint32_t size, bool backwards)
{
    together.running.assign(count, true);
    together.turn = backwards ? count - 1 : 0, together.step = backwards ? -1 : 1, together.waits = 0;
    std::vector<std::thread> blocks;
    for (int b = 0; b < count; b++)
        blocks.emplace_back([=] {
            std::unique_lock<std::mutex> lock(together.mutex);
            together.passed.wait(lock, [&] { return together.turn == b; });
            lock.unlock();
            if (!error)
                start_block(b, {(unsigned)count, 1, 1}, size, 0, backwards);
            lock.lock();
            together.waits = 0;
            pass_turn(lock, true);
        });
    for (std::thread &block : blocks)
        block.join();
}

} // namespace emulation

/* Runs a kernel. Returns NULL or what went wrong. */
extern "C" const char *emulate(void (*kernel)(const void *), uint32_t grid_x, uint32_t grid_y, uint32_t grid_z,
                               uint32_t threads, uint32_t shared_bytes, const void *arguments, int32_t together,
                               int32_t backwards)
{
    using namespace emulation;
    static std::mutex one_at_a_time;
    std::lock_guard<std::mutex> lock(one_at_a_time);
    if (threads < 1 || threads > 1024 || grid_y > 65535 || grid_z > 65535 || shared_bytes > (227 << 10))
        return "a launch that no GPU takes";
    emulation::kernel = kernel, emulation::arguments = arguments, error = NULL;
    uint64_t blocks = (uint64_t)grid_x * grid_y * grid_z;
    if (together)
        start_together((int)blocks, threads, backwards);
    for (uint64_t i = 0; i < blocks && !error && !together; i++)
        start_block(backwards ? blocks - 1 - i : i, {grid_x, grid_y, grid_z}, threads, shared_bytes, backwards);
    return error;
}
