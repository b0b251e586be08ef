/* Puts quantised matrices into panels, and takes rows out of them. */
#include "quantised.h"

static void put_quant(uint8_t *lines, int32_t dtype, int64_t input, int64_t lane, uint8_t quant)
{
    int64_t quad = input / 4;
    if (quant_bits(dtype) == 8)
        lines[(quad * PANEL + lane) * 4 + input % 4] = quant;
    else
        lines[(quad / 2 * PANEL + lane) * 4 + input % 4] |= (uint8_t)(quad % 2 ? quant << 4 : quant);
}

static int32_t get_quant(const uint8_t *lines, int32_t dtype, int64_t input, int64_t lane)
{
    int64_t quad = input / 4;
    if (quant_bits(dtype) == 8)
        return lines[(quad * PANEL + lane) * 4 + input % 4];
    uint8_t both = lines[(quad / 2 * PANEL + lane) * 4 + input % 4];
    return quad % 2 ? both >> 4 : both & 15;
}

static void pack_row(char *panel, int64_t lane, const uint8_t *quants, const uint16_t *scales, const uint16_t *minimums,
                     int64_t k, int32_t dtype, int64_t group)
{
    for (int64_t g = 0; g * group < k; g++) {
        uint8_t *lines = group_lines(panel, dtype, group, g);
        memcpy(group_head(panel, dtype, group, g, false) + lane * 2, scales + g, 2);
        if (minimums)
            memcpy(group_head(panel, dtype, group, g, true) + lane * 2, minimums + g, 2);
        for (int64_t i = 0; i < min_i64(group, k - g * group); i++)
            put_quant(lines, dtype, i, lane, quants[g * group + i]);
    }
}

void pack_quantised(const uint8_t *quants, const uint16_t *scales, const uint16_t *minimums, int32_t n, int32_t k,
                    int32_t dtype, int32_t group, void *packed)
{
    int64_t bytes = quantised_panel_bytes(dtype, group, k), groups = (k + group - 1) / group;
    for (int64_t panel = 0; panel < (n + PANEL - 1) / PANEL; panel++) {
        char *to = (char *)packed + panel * bytes;
        memset(to, 0, (size_t)bytes);
        for (int64_t row = panel * PANEL; row < min_i64(n, (panel + 1) * PANEL); row++)
            pack_row(to, row % PANEL, quants + row * k, scales + row * groups, minimums ? minimums + row * groups : NULL,
                     k, dtype, group);
    }
}

void unpack_quantised_row(const void *packed, int32_t dtype, int64_t group, int64_t k, int64_t row, float *out)
{
    char *panel = (char *)packed + row / PANEL * quantised_panel_bytes(dtype, group, k);
    int64_t lane = row % PANEL;
    for (int64_t g = 0; g * group < k; g++) {
        const uint8_t *lines = group_lines(panel, dtype, group, g);
        uint16_t scale, minimum = 0;
        memcpy(&scale, group_head(panel, dtype, group, g, false) + lane * 2, 2);
        if (has_minimums(dtype))
            memcpy(&minimum, group_head(panel, dtype, group, g, true) + lane * 2, 2);
        for (int64_t i = 0; i < min_i64(group, k - g * group); i++)
            out[g * group + i] = (float)(get_quant(lines, dtype, i, lane) - quant_zero(dtype)) * f16_to_f32(scale)
                                 + f16_to_f32(minimum);
    }
}
