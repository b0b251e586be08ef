/* hopper.cuh's names for a CPU. It is strict about what runs in the background: bytes of a box arrive when somebody waits
 * for them; sums are NaN until they have been waited for, and what products read, in shared memory and in registers, has
 * to be the same then as when they began; barriers are to be made, published, and left as they were found. */
#ifndef EMULATED_HOPPER_H
#define EMULATED_HOPPER_H

struct alignas(64) tensor_map { char opaque[128]; };

#define KERNEL_WITH_MAP(name, type, threads)                                                                          \
    static void name##_of_thread(const struct tensor_map &map, const struct type &op, const struct team &team);       \
    extern "C" void name##_kernel(const void *arguments)                                                              \
    {                                                                                                                 \
        struct all { char map[sizeof(struct tensor_map)]; struct type op; struct team team; };                        \
        const struct all *a = (const struct all *)arguments;                                                          \
        struct tensor_map map;                                                                                        \
        memcpy(&map, a->map, sizeof map);                                                                             \
        name##_of_thread(map, a->op, a->team);                                                                        \
    }                                                                                                                 \
    static void name##_of_thread([[maybe_unused]] const struct tensor_map &map, [[maybe_unused]] const struct type &op, \
                                 [[maybe_unused]] const struct team &team)

namespace emulation {
/* Of a thread: sum [count][4] += its part of a · b. */
void start_product(float (*sum)[4], int count, const uint32_t *a, uint64_t b, bool add, bool transposed);
void finish_products(int but);
}

uint32_t shared_address(const void *at);
void make_barrier(uint64_t *barrier, int count);
void publish_barriers();
void arrive(uint64_t *barrier);
void arrive_expecting(uint64_t *barrier, int bytes);
void wait_for(uint64_t *barrier, int parity);
void copy_box(void *to, const struct tensor_map &map, int column, int row, uint64_t *barrier);
void wait_at(int number, int threads);
void arrive_at(int number, int threads);
template <int COUNT> static inline void give_registers() { static_assert(COUNT >= 24 && COUNT % 8 == 0); }
template <int COUNT> static inline void take_registers() { static_assert(COUNT <= 256 && COUNT % 8 == 0); }
void begin_products();
void end_group();
template <int PENDING, int COUNT> static inline void wait_for_products(float (&)[COUNT][4])
{
    emulation::finish_products(PENDING);
}
template <bool TRANSPOSED, int COUNT>
static inline void multiply(float (&sum)[COUNT][4], const uint32_t (&a)[4], uint64_t b, bool add)
{
    emulation::start_product(sum, COUNT, a, b, add, TRANSPOSED);
}

#endif
