/* Quantised matrices on a GPU: where a weight lies, and how quants are widened. engine/cuda/panels.py packs them.
 *
 * A weight is (quant - zero) · scale + minimum. A panel of PANEL outputs is lines of 32 times LINE bytes, then the heads
 * of its groups. Lane 4 · g + t of a line has quants of outputs g and g + 8, of each STEP of 16 inputs those from 4 · t on:
 *   8 bits  [STEPS][g, g + 8][4]
 *   4 bits  [STEPS][4], g in the low halves of the bytes, g + 8 in the high ones
 * which is what mma.m16n8k16 takes of its first operand, if even and odd inputs of four count as its two pairs. A head is
 * [8 g][scales, minimums if there are][g, g + 8] of f16. What lies beyond n and k is zero; heads are as many as the
 * lines have groups. */
#ifndef QUANTS_CUH
#define QUANTS_CUH

#include "common.cuh"

/* Quants are widened around the middle of their range, whatever their zero. */
template <int BITS_, bool MINIMUMS_> struct quants {
    enum {
        BITS = BITS_, MINIMUMS = MINIMUMS_,
        MIDDLE = 1 << (BITS - 1), ZERO = MINIMUMS ? 0 : MIDDLE,
        STEP = 16, WORDS = BITS / 4,              /* inputs of a step; words of it that a lane has */
        STEPS = 4 / WORDS, INPUTS = STEPS * STEP, /* of a line */
        KINDS = MINIMUMS ? 2 : 1
    };
};
using i8 = struct quants<8, false>;
using i4 = struct quants<4, false>;
using u8 = struct quants<8, true>;
using u4 = struct quants<4, true>;

/* The scales of outputs g and g + 8 in the two halves, and the minimums. */
struct alignas(8) head {
    uint32_t scales, minimums;
};

/* One panel, as a lane sees it. */
struct panel {
    const char *lines, *heads;
    int line_count, group_bits; /* a group is 2 to the power of group_bits inputs */
};
template <class Q> DEVICE struct panel panel_of(const char *matrix, int64_t k, int group, int64_t index, int lane)
{
    int lines = (int)((k + Q::INPUTS - 1) / Q::INPUTS), bits = 0;
    while (1 << bits < group)
        bits++;
    int64_t size = lines * (int64_t)(WARP * LINE), groups = (lines * Q::INPUTS + group - 1) >> bits;
    const char *start = matrix + index * (size + groups * PANEL * 2 * Q::KINDS);
    return {start + lane * LINE, start + size + lane / 4 * 4 * Q::KINDS, lines, bits};
}
template <class Q> DEVICE struct head head_at(const struct panel &panel, int input)
{
    const char *at = panel.heads + (input >> panel.group_bits) * PANEL * 2 * Q::KINDS;
    if (Q::MINIMUMS)
        return *(const struct head *)at;
    return {*(const uint32_t *)at, 0};
}
/* Of output g or, where `upper`, g + 8. The minimum is what the middle quant stands for. */
DEVICE float half_of(uint32_t pair, bool upper) { return f16_to_f32((uint16_t)(upper ? pair >> 16 : pair)); }
template <class Q> DEVICE float scale_of(struct head head, bool upper) { return half_of(head.scales, upper); }
template <class Q> DEVICE float minimum_of(struct head head, bool upper)
{
    return Q::MINIMUMS ? fmaf(Q::MIDDLE, scale_of<Q>(head, upper), half_of(head.minimums, upper)) : 0.0f;
}

/* The quants of a step as the first operand of mma_bf16, exactly (quant - MIDDLE) / WIDENED: the bits of a quant go into
 * the fraction of a number from 1/2 up, what they count too much is taken off again. Of 8 bits the upper one is left out
 * and decides how much that is. */
enum { WIDENED = 256 };
template <class Q> DEVICE void widen_step(const uint32_t *words, uint32_t *pairs)
{
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (Q::BITS == 8) {
            uint32_t word = words[i % 2] >> i / 2 * 8;
            pairs[i] = add_bf16(and_or(word, 0x007f007fu, 0x3f003f00u), and_xor(word, 0x00800080u, 0xbf80bf80u));
        } else
            pairs[i] = add_bf16(and_or(words[0] >> i * 4, 0x000f000fu, 0x3f003f00u), 0xbf08bf08u);
    }
}

/* One weight of row `row`. */
template <class Q> DEVICE float weight_at(const char *matrix, int64_t k, int group, int64_t row, int input)
{
    int lane = (int)(row % 8 * 4 + input % Q::STEP / 4), step = input % Q::INPUTS / Q::STEP;
    bool upper = row % PANEL >= 8;
    struct panel panel = panel_of<Q>(matrix, k, group, row / PANEL, lane);
    const uint8_t *quads = (const uint8_t *)panel.lines + input / Q::INPUTS * (WARP * LINE) + step * Q::WORDS * 4;
    int byte = quads[(Q::BITS == 8 && upper ? 4 : 0) + input % 4];
    int quant = Q::BITS == 8 ? byte : upper ? byte >> 4 : byte & 15;
    struct head head = head_at<Q>(panel, input);
    float scaled = (float)(quant - Q::ZERO) * half_of(head.scales, upper); /* exact */
    return Q::MINIMUMS ? scaled + half_of(head.minimums, upper) : scaled;
}

#endif
