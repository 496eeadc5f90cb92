// Threads that wait for work. The caller works too.
//
// A step has some hundred rounds of work, microseconds long. So whoever waits watches for a while before it sleeps, and
// what is counted is counted without a lock. Each thread begins with a share of its own, which lies together in memory,
// and then takes from the others' what is left.
#include "common.h"
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <pthread.h>
#include <thread>
#ifdef AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {
constexpr int MOST = 256;     // threads
constexpr int WATCHED = 2000;  // times that something is looked at before its watcher sleeps

template <class Holds> bool watch(const Holds &holds) {
    for (int i = 0; i < WATCHED; i++) {
        if (holds()) return true;
#if defined(__x86_64__)
        _mm_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }
    return holds();
}

struct Pool {
    std::mutex one_call, lock;  // the second one only for those who sleep
    std::condition_variable wake, done;
    // The number of the round, whether threads may still join it, and how many of them are in it. What a round is about
    // is written before it opens, and again when it is closed and nobody is in it.
    static constexpr uint64_t OPEN = 1 << 15, JOINED = OPEN - 1, ROUND = 1 << 16;
    alignas(64) std::atomic<uint64_t> state{0};
    std::atomic<int> asleep{0};
    std::atomic<bool> caller_sleeps{false};
    const std::function<void(int64_t)> *work = nullptr;
    int shares = 0, started = 0;
    struct alignas(64) Share {
        std::atomic<int64_t> next;
        int64_t end;
    } share[MOST];

    void run(int own) {
        for (int i = 0; i < shares; i++) {
            Share &from = share[(own + i) % shares];
            while (from.next.load(std::memory_order_relaxed) < from.end) {
                const int64_t n = from.next.fetch_add(1, std::memory_order_relaxed);
                if (n < from.end) (*work)(n);
            }
        }
    }
    void serve(int number) {
        uint64_t last = 0;
        const auto more = [&] { return state.load() / ROUND != last; };
        for (;;) {
            if (!watch(more)) {
                std::unique_lock<std::mutex> held(lock);
                asleep++;
                wake.wait(held, more);
                asleep--;
            }
            uint64_t now = state.load();
            last = now / ROUND;
            bool joined = false;
            while (now / ROUND == last && now & OPEN && !(joined = state.compare_exchange_weak(now, now + 1))) {}
            if (!joined) continue;
            if (number < shares) run(number);
            if ((state.fetch_sub(1) & JOINED) == 1 && caller_sleeps) {
                std::lock_guard<std::mutex> held(lock);
                done.notify_one();
            }
        }
    }
    void call(int64_t jobs, int threads, const std::function<void(int64_t)> &what) {
        std::lock_guard<std::mutex> one(one_call);
        while (started < threads - 1) {
            const int number = started + 1;
            try {
                std::thread([this, number] { serve(number); }).detach();
            } catch (const std::exception &) {
                break;  // the system gives no more threads: fewer do the work
            }
            started++;
        }
        work = &what;
        shares = std::min(started + 1, threads);
        for (int i = 0; i < shares; i++) {
            share[i].next.store(jobs * i / shares, std::memory_order_relaxed);
            share[i].end = jobs * (i + 1) / shares;
        }
        state = (state / ROUND + 1) * ROUND + OPEN;
        if (asleep) {
            std::lock_guard<std::mutex> held(lock);
            wake.notify_all();
        }
        run(0);
        state -= OPEN;  // who comes now has nothing to do here
        const auto left = [&] { return !(state & JOINED); };
        if (watch(left)) return;
        std::unique_lock<std::mutex> held(lock);
        caller_sleeps = true;
        done.wait(held, left);
        caller_sleeps = false;
    }
};
std::atomic<Pool *> pool{nullptr};
// A forked child has no threads of its parent's: it makes its own.
const int at_fork = pthread_atfork(nullptr, nullptr, [] { pool = nullptr; });

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
    Pool *found = pool;
    if (!found) {
        Pool *made = new Pool;
        if (pool.compare_exchange_strong(found, made))
            found = made;
        else
            delete made;
    }
    found->call(count, std::min(threads, MOST), work);
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
