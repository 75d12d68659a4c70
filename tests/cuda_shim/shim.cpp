// The scheduler of the fibers, in place of csrc/cuda/launch.cu.
#include "shim.h"

#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cuda/launch.h"

namespace shim {

Index thread_index, block_index, block_size, grid_size;

namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 128 * 1024;

enum class State { Ready, AtBlockBarrier, AtShuffle, AtGridBarrier, Done };
// Uneven: one warp runs on for as long as it can before the next gets a turn.
enum class Order { Forward, Reverse, Random, Uneven };

struct Fiber {
    unsigned block, thread;
    State state = State::Ready;
    std::string barrier;  // that it waits at
    double value = 0.0;
    ucontext_t context;
    std::unique_ptr<char[]> stack;
};

// What the test has asked for.
int wanted_blocks = 3;
Order order = Order::Forward;
unsigned seed = 0;
std::string skipped;            // barrier that is left out
std::set<std::string> reached;  // barriers
std::string listed;

struct Launch {
    samk::cuda::Kernel* kernel = nullptr;
    const samk::cuda::Packed* packed = nullptr;
    bool cooperative = false;
    std::vector<Fiber> fibers;
    std::vector<std::vector<char>> shared;
    ucontext_t scheduler;
    Fiber* running = nullptr;
    std::string error;
};

Launch* current = nullptr;

void fail(const std::string& message) {
    if (current->error.empty()) current->error = message;
}

void give_way(State state) {
    Fiber* fiber = current->running;
    fiber->state = state;
    swapcontext(&fiber->context, &current->scheduler);
}

void fiber_main() {
    current->kernel(*current->packed);
    current->running->state = State::Done;
    swapcontext(&current->running->context, &current->scheduler);
}

// Lets those go on that have waited for `state` at once: all in [begin, end) that are not done.
bool release(size_t begin, size_t end, State state) {
    bool any = false;
    const std::string* barrier = nullptr;
    for (size_t f = begin; f < end; ++f) {
        const Fiber& fiber = current->fibers[f];
        if (fiber.state == State::Done) continue;
        if (fiber.state != state) return false;
        if (barrier && fiber.barrier != *barrier) fail("threads of a block wait at different barriers");
        any = true;
        barrier = &fiber.barrier;
    }
    for (size_t f = begin; f < end && any; ++f)
        if (current->fibers[f].state == state) current->fibers[f].state = State::Ready;
    return any;
}

void run() {
    std::vector<Fiber>& fibers = current->fibers;
    std::vector<size_t> turn(fibers.size());
    for (size_t f = 0; f < turn.size(); ++f) turn[f] = order == Order::Reverse ? turn.size() - 1 - f : f;
    std::mt19937 random(seed);
    const size_t threads = block_size.x;
    std::vector<size_t> warps(fibers.size() / kWarp);
    for (size_t w = 0; w < warps.size(); ++w) warps[w] = w;
    if (order == Order::Uneven) std::shuffle(warps.begin(), warps.end(), random);
    while (current->error.empty()) {
        if (order == Order::Random) std::shuffle(turn.begin(), turn.end(), random);
        size_t favourite = fibers.size();
        for (size_t w = 0; w < warps.size() && favourite == fibers.size(); ++w)
            for (size_t f = warps[w] * kWarp; f < (warps[w] + 1) * kWarp; ++f)
                if (fibers[f].state == State::Ready) favourite = warps[w];
        bool progress = false;
        for (const size_t f : turn) {
            Fiber& fiber = fibers[f];
            if (fiber.state != State::Ready || (order == Order::Uneven && f / kWarp != favourite)) continue;
            progress = true;
            current->running = &fiber;
            thread_index.x = fiber.thread;
            block_index.x = fiber.block;
            swapcontext(&current->scheduler, &fiber.context);
            if (!current->error.empty()) return;
        }
        for (size_t begin = 0; begin < fibers.size(); begin += kWarp)
            progress = release(begin, begin + kWarp, State::AtShuffle) || progress;
        for (size_t begin = 0; begin < fibers.size(); begin += threads)
            progress = release(begin, begin + threads, State::AtBlockBarrier) || progress;
        progress = release(0, fibers.size(), State::AtGridBarrier) || progress;
        if (progress) continue;
        if (std::any_of(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.state != State::Done; }))
            fail("deadlock: not all threads reach a barrier");
        return;
    }
}

}  // namespace

namespace {

void wait_at(const std::string& barrier, State state) {
    reached.insert(barrier);
    if (barrier == skipped) return;
    current->running->barrier = barrier;
    give_way(state);
}

}  // namespace

void block_barrier(const char* file, int line) {
    const std::string path = file;
    wait_at(path.substr(path.rfind('/') + 1) + ":" + std::to_string(line), State::AtBlockBarrier);
}

void grid_barrier() {
    if (!current->cooperative) fail("a grid barrier in a launch that is not cooperative");
    wait_at("grid", State::AtGridBarrier);
}

double shuffle_down(double value, int distance) {
    Fiber* self = current->running;
    self->value = value;
    self->barrier = "shuffle";
    give_way(State::AtShuffle);
    const unsigned lane = self->thread % kWarp;
    const double result = lane + distance < kWarp ? (self + distance)->value : value;
    give_way(State::AtShuffle);
    return result;
}

void* shared_memory(size_t size) {
    std::vector<char>& memory = current->shared[current->running->block];
    // What has not been written holds NaN.
    if (memory.empty()) memory.assign(size, char(0xff));
    return memory.data();
}

void check_alignment(const void* place, size_t size) {
    if (reinterpret_cast<uintptr_t>(place) % size != 0)
        fail("a misaligned access of " + std::to_string(size) + " bytes");
}

}  // namespace shim

namespace samk {
namespace cuda {

DeviceGuard::DeviceGuard(int) {}
DeviceGuard::~DeviceGuard() {}

int resident_blocks(Kernel*, int, int) { return shim::wanted_blocks; }

void launch(Kernel* kernel, const Packed& packed, int blocks, int threads, bool cooperative, void*) {
    using namespace shim;
    Launch launch;
    launch.kernel = kernel;
    launch.packed = &packed;
    launch.cooperative = cooperative;
    launch.shared.resize(size_t(blocks));
    launch.fibers.resize(size_t(blocks) * size_t(threads));
    block_size.x = unsigned(threads);
    grid_size.x = unsigned(blocks);
    current = &launch;
    for (size_t f = 0; f < launch.fibers.size(); ++f) {
        Fiber& fiber = launch.fibers[f];
        fiber.block = unsigned(f / size_t(threads));
        fiber.thread = unsigned(f % size_t(threads));
        fiber.stack.reset(new char[kStack]);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStack;
        makecontext(&fiber.context, fiber_main, 0);
    }
    run();
    current = nullptr;
    if (!launch.error.empty()) throw std::runtime_error(launch.error);
}

std::string why_unusable(int) { return ""; }

}  // namespace cuda
}  // namespace samk

// For the tests, by ctypes.
#define SHIM_EXPORT extern "C" __attribute__((visibility("default")))

// blocks: of a grid, at most. order: 0 forward, 1 reverse, 2 random, 3 uneven. skipped: the name of a barrier to leave out.
SHIM_EXPORT void shim_configure(int blocks, int order, unsigned seed, const char* skipped) {
    shim::wanted_blocks = blocks;
    shim::order = shim::Order(order);
    shim::seed = seed;
    shim::skipped = skipped;
}

// The names of the barriers that have been reached so far, one a line.
SHIM_EXPORT const char* shim_barriers() {
    shim::listed.clear();
    for (const std::string& name : shim::reached) shim::listed += name + "\n";
    return shim::listed.c_str();
}
