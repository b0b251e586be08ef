/* What is behind emulated_hopper.h, and a cuTensorMapEncodeTiled that refuses what NVIDIA's refuses. Layouts are read as
 * the PTX ISA has them ("Asynchronous warpgroup level matrix", "Tensor swizzling modes"), not as the kernels make them. */
#include <math.h>
#include <stdint.h>

#include <algorithm>
#include <map>
#include <vector>

#include "abi.h"
#include "emulation.h"
#include "emulated_hopper.h"

namespace emulation {

enum { LANES = 32, GROUP = 128, DYNAMIC_START = 0x430, K = 16 /* of a product */ };

/* Only what kernels use: two dimensions of 16-bit numbers, boxes of 128 bytes a row, swizzled. */
struct matrix {
    const char *at;
    uint64_t columns, rows, stride;
    uint32_t box_columns, box_rows;
};

struct box {
    char *to;
    matrix from;
    int64_t column, row;
    int bytes() const { return (int)(from.box_columns * from.box_rows * 2); }
};

struct byte_barrier {
    int count, left, announced;
    unsigned phase;
    bool published;
    std::vector<box> on_their_way;
};

struct named_barrier {
    int arrived;
    unsigned epoch;
};

/* The second operand of one product of a warpgroup, as its first thread found it. */
struct operand {
    uint64_t description;
    int columns, done;
    bool transposed;
    std::vector<uint16_t> numbers; /* [columns][K] */
};

struct product {
    float (*sum)[4];
    int count, number, group;
    const uint32_t *a;
    uint32_t a_before[4];
};

/* A thread's sums that are being made: what they will be. */
struct progress_of_thread {
    std::vector<product> products;
    std::map<float (*)[4], std::vector<float>> sums;
    int started, groups;
    bool begun;
};

static std::map<uint64_t *, byte_barrier> barriers;
static named_barrier named[16];
static std::map<std::pair<int, int>, operand> operands; /* by warpgroup and number */
static std::vector<progress_of_thread> threads;

void begin_block_on_hopper(int count)
{
    barriers.clear();
    operands.clear();
    std::fill(std::begin(named), std::end(named), named_barrier{});
    threads.assign(count, {});
}

const char *end_block_on_hopper()
{
    for (auto &[at, barrier] : barriers)
        if (!barrier.on_their_way.empty() || barrier.announced)
            return "a block ended before its boxes arrived";
    for (auto &barrier : named)
        if (barrier.arrived)
            return "a barrier at which nobody waits any more";
    if (!operands.empty())
        return "a block ended before its products, or not all of a warpgroup multiplied";
    return NULL;
}

static progress_of_thread &mine() { return threads[thread_number()]; }

/* Byte barriers and boxes. */

static byte_barrier &barrier_of(uint64_t *at)
{
    auto found = barriers.find(at);
    if (found == barriers.end())
        stop("a barrier that has not been made");
    return found->second;
}

static int bytes_of(const std::vector<box> &boxes)
{
    int sum = 0;
    for (auto &b : boxes)
        sum += b.bytes();
    return sum;
}

/* The eighth of a swizzled row of 128 bytes changes with its number among eight: bits 4 to 6 of an address with 7 to 9. */
static uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }
static char *at_address(uint32_t address) { return dynamic_shared + (address - DYNAMIC_START); }

static void deliver(const box &b)
{
    uint32_t start = shared_address(b.to);
    for (uint32_t r = 0; r < b.from.box_rows; r++)
        for (uint32_t c = 0; c < b.from.box_columns; c++) {
            int64_t row = b.row + r, column = b.column + c;
            bool inside = row >= 0 && row < (int64_t)b.from.rows && column >= 0 && column < (int64_t)b.from.columns;
            char *to = at_address(swizzled(start + (r * b.from.box_columns + c) * 2));
            memset(to, 0, 2);
            if (inside)
                memcpy(to, b.from.at + row * b.from.stride + column * 2, 2);
        }
}

/* Ends the phase if all have arrived; the last bytes come only when somebody waits. */
static void end_phase(byte_barrier &b, bool waited_for)
{
    if (b.left || !(waited_for || b.on_their_way.empty()) || bytes_of(b.on_their_way) != b.announced)
        return;
    for (auto &box : b.on_their_way)
        deliver(box);
    b.on_their_way.clear();
    b.left = b.count, b.announced = 0, b.phase++;
    progress();
}

/* Named barriers. */

static void arrive_named(int number, int count)
{
    if (number < 1 || number > 15 || count % LANES)
        stop("a barrier that no block has");
    progress();
    if (++named[number].arrived == count) {
        named[number].arrived = 0;
        named[number].epoch++;
    }
}

/* Products. */

static uint16_t number_at(const operand &o, int column, int k)
{
    uint64_t d = o.description;
    uint32_t start = (uint32_t)(d & 0x3fff) << 4, leading = (uint32_t)(d >> 16 & 0x3fff) << 4;
    uint32_t stride = (uint32_t)(d >> 32 & 0x3fff) << 4;
    uint32_t offset = o.transposed ? column % 64 * 2 + column / 64 * leading + k % 8 * 128 + k / 8 * stride
                                   : column % 8 * 128 + column / 8 * stride + k * 2;
    uint16_t number;
    memcpy(&number, at_address(swizzled(start + offset)), 2);
    return number;
}

static std::vector<uint16_t> numbers_of(const operand &o)
{
    std::vector<uint16_t> numbers(o.columns * K);
    for (int i = 0; i < (int)numbers.size(); i++)
        numbers[i] = number_at(o, i / K, i % K);
    return numbers;
}

static operand &operand_of(int number, int count, uint64_t description, bool transposed)
{
    auto [at, first] = operands.insert({{thread_number() / GROUP, number}, {description, count * 8, 0, transposed, {}}});
    operand &o = at->second;
    if (description >> 62 != 1 || description >> 49 & 7)
        stop("a description of a tile that is not swizzled by 128 bytes from a multiple of 1,024 on");
    if (first)
        o.numbers = numbers_of(o);
    if (o.description != description || o.columns != count * 8 || o.transposed != transposed)
        stop("threads of a warpgroup that multiply by different operands");
    return o;
}

/* lane = 4 · g + t: it has columns 2t and 2t + 1 of every eight, of rows g and g + 8; a: of those rows k = 2t, 2t + 1 and
 * eight more, in four pieces. */
void start_product(float (*sum)[4], int count, const uint32_t *a, uint64_t b, bool add, bool transposed)
{
    auto &me = mine();
    if (!me.begun)
        stop("products before begin_products()");
    operand &o = operand_of(me.started, count, b, transposed);
    auto [at, fresh] = me.sums.insert({sum, {}});
    if (fresh) {
        at->second.assign(&sum[0][0], &sum[0][0] + 4 * count);
        memset(sum, 0xff, sizeof(float) * 4 * count);
    }
    const char *slots = exchange(a, 16);
    float rows[2][K];
    for (int r = 0; r < 2; r++)
        for (int k = 0; k < K; k++) {
            uint16_t number;
            memcpy(&number, slots + (lane() / 4 * 4 + k % 8 / 2) * SLOT + (r + k / 8 * 2) * 4 + k % 2 * 2, 2);
            rows[r][k] = bf16_to_f32(number);
        }
    for (int i = 0; i < 4 * count; i++) {
        const uint16_t *column = &o.numbers[(i / 4 * 8 + lane() % 4 * 2 + i % 2) * K];
        float &x = at->second[i], added = 0.0f;
        for (int k = 0; k < K; k++)
            added += rows[i / 2 % 2][k] * bf16_to_f32(column[k]);
        x = (add ? x : 0.0f) + added;
    }
    me.products.push_back({sum, count, me.started++, me.groups, a, {a[0], a[1], a[2], a[3]}});
}

static void finish(const product &p)
{
    operand &o = operands.at({thread_number() / GROUP, p.number});
    if (lane() == 0 && numbers_of(o) != o.numbers)
        stop("shared memory changed under a product");
    if (memcmp(p.a, p.a_before, sizeof p.a_before))
        stop("registers changed under a product");
    if (++o.done == GROUP)
        operands.erase({thread_number() / GROUP, p.number});
}

void finish_products(int but)
{
    auto &me = mine();
    wait_for_warp();
    me.begun = false;
    auto over = [&](const product &p) { return p.group < me.groups - but; };
    for (auto &p : me.products)
        if (over(p))
            finish(p);
    me.products.erase(std::remove_if(me.products.begin(), me.products.end(), over), me.products.end());
    for (auto at = me.sums.begin(); at != me.sums.end();) {
        float(*sum)[4] = at->first;
        auto uses = [&](const product &p) { return p.sum == sum; };
        if (std::any_of(me.products.begin(), me.products.end(), uses)) {
            at++;
            continue;
        }
        for (size_t i = 0; i < at->second.size(); i++) {
            if (float_to_bits(sum[i / 4][i % 4]) != 0xffffffffu)
                stop("sums changed under a product");
            sum[i / 4][i % 4] = at->second[i];
        }
        at = me.sums.erase(at);
    }
}

} // namespace emulation

using namespace emulation;

uint32_t shared_address(const void *at) { return (uint32_t)((const char *)at - dynamic_shared) + DYNAMIC_START; }

void make_barrier(uint64_t *barrier, int count)
{
    if (!barriers.insert({barrier, {count, count, 0, 0, false, {}}}).second)
        stop("a barrier that is made twice");
}

void publish_barriers()
{
    for (auto &[at, barrier] : barriers)
        barrier.published = true;
}

void arrive(uint64_t *barrier) { arrive_expecting(barrier, 0); }

void arrive_expecting(uint64_t *barrier, int bytes)
{
    byte_barrier &b = barrier_of(barrier);
    if (b.left == 0)
        stop("more arrivals at a barrier than it was made for");
    b.left--;
    b.announced += bytes;
    progress();
    end_phase(b, false);
}

void wait_for(uint64_t *barrier, int parity)
{
    byte_barrier &b = barrier_of(barrier);
    while ((int)(b.phase & 1) == parity) {
        end_phase(b, true);
        if ((int)(b.phase & 1) == parity)
            yield();
    }
}

void copy_box(void *to, const struct tensor_map &map, int column, int row, uint64_t *barrier)
{
    byte_barrier &b = barrier_of(barrier);
    box box = {(char *)to, {}, column, row};
    memcpy(&box.from, map.opaque, sizeof box.from);
    if (!b.published)
        stop("a barrier that the copy engine does not know of");
    if (shared_address(to) % 1024)
        stop("a box whose swizzle does not begin with it");
    memset(to, 0xff, box.bytes());
    b.on_their_way.push_back(box);
    if (bytes_of(b.on_their_way) > b.announced)
        stop("more bytes than a barrier was told of");
}

void arrive_at(int number, int threads) { arrive_named(number, threads); }
void wait_at(int number, int threads)
{
    unsigned epoch = named[number].epoch;
    arrive_named(number, threads);
    while (named[number].epoch == epoch)
        yield();
}

void begin_products()
{
    wait_for_warp();
    mine().begun = true;
}
void end_group()
{
    wait_for_warp();
    mine().groups++;
}

/* NVIDIA's signature; 1 is CUDA_ERROR_INVALID_VALUE. */
extern "C" int cuTensorMapEncodeTiled(void *map, int type, uint32_t rank, void *start, const uint64_t *sizes,
                                      const uint64_t *strides, const uint32_t *box, const uint32_t *steps, int interleave,
                                      int swizzle, int promotion, int fill)
{
    enum { BFLOAT16 = 9, SWIZZLE_128B = 3 };
    if ((uintptr_t)map % 64 || type != BFLOAT16 || rank != 2 || interleave || swizzle != SWIZZLE_128B || fill)
        return 1;
    if ((uintptr_t)start % 16 || strides[0] % 16 || strides[0] >= (uint64_t)1 << 40 || promotion < 0 || promotion > 3)
        return 1;
    for (int i = 0; i < 2; i++)
        if (sizes[i] < 1 || sizes[i] > (uint64_t)1 << 32 || box[i] < 1 || box[i] > 256 || steps[i] != 1)
            return 1;
    if (box[0] * 2 > 128 || box[0] * 2 % 16)
        return 1;
    matrix made = {(const char *)start, sizes[0], sizes[1], strides[0], box[0], box[1]};
    memset(map, 0, 128);
    memcpy(map, &made, sizeof made);
    return 0;
}
