// Threads that wait for work. The caller works too.
#include "common.h"
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <unistd.h>
#include <vector>
#ifdef AMX
#include <sys/syscall.h>
#endif

namespace {
struct Pool {
    std::mutex lock, one_call;
    std::condition_variable wake, done;
    const std::function<void(int64_t)> *work = nullptr;
    std::atomic<int64_t> next{0};
    int64_t count = 0;
    int wanted = 0, busy = 0;
    uint64_t round = 0;
    std::atomic<uint64_t> seen_round{0};
    int started = 0;

    void run() {
        for (int64_t i; (i = next.fetch_add(1)) < count;) (*work)(i);
    }
    void serve(int number) {
        uint64_t last = 0;
        for (;;) {
            for (int spin = 0; spin < 2000 && seen_round.load(std::memory_order_acquire) == last; spin++) {
#if defined(__x86_64__)
                _mm_pause();
#endif
            }
            std::unique_lock<std::mutex> held(lock);
            wake.wait(held, [&] { return round != last; });
            last = round;
            if (number >= wanted) continue;
            held.unlock();
            run();
            held.lock();
            if (--busy == 0) done.notify_one();
        }
    }
    void call(int64_t jobs, int threads, const std::function<void(int64_t)> &what) {
        std::unique_lock<std::mutex> held(lock);
        while (started < threads - 1) {
            int number = started;
            try {
                std::thread([this, number] { serve(number); }).detach();
            } catch (const std::exception &) {
                break;  // the system gives no more threads: fewer do the work
            }
            started++;
        }
        work = &what;
        count = jobs;
        next = 0;
        wanted = busy = std::min(started, threads - 1);
        seen_round = ++round;
        held.unlock();
        wake.notify_all();
        run();
        held.lock();
        done.wait(held, [&] { return busy == 0; });
    }
};
Pool *pool = nullptr;
pid_t owner = 0;
std::mutex making;

struct Kept {
    char *at[8] = {};
    size_t bytes[8] = {};
    ~Kept() {
        for (char *one : at) free(one);
    }
};
thread_local Kept kept;
}  // namespace

void parallel(int64_t count, int threads, const std::function<void(int64_t)> &work) {
    if (threads <= 1 || count <= 1) {
        for (int64_t i = 0; i < count; i++) work(i);
        return;
    }
    {
        std::lock_guard<std::mutex> held(making);
        if (owner != getpid()) {  // a forked child has no threads of its parent's
            pool = new Pool;
            owner = getpid();
        }
    }
    std::lock_guard<std::mutex> one(pool->one_call);
    pool->call(count, threads, work);
}

char *scratch(int slot, size_t bytes) {
    if (kept.bytes[slot] < bytes) {
        free(kept.at[slot]);
        size_t rounded = (bytes + 4095) / 4096 * 4096;
        kept.at[slot] = (char *)aligned_alloc(64, rounded);
        kept.bytes[slot] = kept.at[slot] ? rounded : 0;
        if (!kept.at[slot]) abort();
    }
    return kept.at[slot];
}

bool amx_allowed() {
#ifdef AMX
    static const bool allowed = syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, tile data
    return allowed;
#else
    return false;
#endif
}

extern "C" const char *octo_path() {
#if defined(AMX)
    return amx_allowed() ? "AVX-512 VNNI, AMX" : "AVX-512 VNNI";
#elif defined(WIDE_VNNI)
    return "AVX-512 VNNI";
#elif defined(__AVX512BW__)
    return "AVX-512";
#elif defined(__AVXVNNI__)
    return "AVX2 VNNI";
#elif defined(__AVX2__)
    return "AVX2";
#elif defined(__ARM_FEATURE_DOTPROD)
    return "NEON dot products";
#else
    return "plain loops";
#endif
}

// Run kernels one after the other, each on its own arguments.
struct Recorded {
    void (*kernel)(const void *);
    const void *arguments;
};
extern "C" void octo_run(const Recorded *calls, int64_t count) {
    for (int64_t i = 0; i < count; i++) calls[i].kernel(calls[i].arguments);
}
