/* Reads matrices from files or memory straight into packed panels. */
#define _FILE_OFFSET_BITS 64
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "quantised.h"
#include "simd.h"

static int64_t element_bytes(int32_t dtype) { return dtype == DTYPE_F32 ? 4 : 2; }

/* Up to PANEL rows of a matrix, whatever source each comes from. */
struct panel_rows {
    const char *data[PANEL];
    int32_t dtype[PANEL];
    int64_t count;
};

/* `rows` rows of a source from `first` on: where they lie in memory, or read into `buffer`. NULL if it ends too soon. */
static const char *read_rows(const struct source *s, int64_t first, int64_t rows, int64_t row_bytes, char *buffer)
{
    if (s->fd < 0)
        return (const char *)s->data + first * row_bytes;
    int64_t want = rows * row_bytes, have = 0;
    while (have < want) {
        ssize_t got = pread(s->fd, buffer + have, (size_t)(want - have), s->offset + first * row_bytes + have);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return NULL;
        have += got;
    }
    return buffer;
}

/* Finds rows [begin, end) of the stacked sources. Returns 0, or 1 + the index of a source that is too short. */
static int32_t find_rows(const struct source *sources, int32_t count, int64_t begin, int64_t end, int64_t k,
                         struct panel_rows *rows, char *buffer)
{
    int64_t start = 0; /* of the source among all rows */
    rows->count = 0;
    for (int32_t s = 0; s < count; start += sources[s++].rows) {
        int64_t row_bytes = k * element_bytes(sources[s].dtype);
        int64_t first = max_i64(begin, start), last = min_i64(end, start + sources[s].rows);
        if (first >= last)
            continue;
        char *place = buffer + rows->count * k * 4;
        const char *data = read_rows(&sources[s], first - start, last - first, row_bytes, place);
        if (!data)
            return s + 1;
        for (int64_t i = 0; i < last - first; i++) {
            rows->dtype[rows->count] = sources[s].dtype;
            rows->data[rows->count++] = data + i * row_bytes;
        }
    }
    return 0;
}

static float read_element(const char *at, int32_t dtype)
{
    if (dtype == DTYPE_F32) {
        float f;
        memcpy(&f, at, 4);
        return f;
    }
    uint16_t half;
    memcpy(&half, at, 2);
    return dtype == DTYPE_BF16 ? bf16_to_f32(half) : f16_to_f32(half);
}

/* Moves bits from full rows: units of 4 bytes, a float or a pair of bf16. */
static void pack_units(const struct panel_rows *rows, int64_t units, char *panel)
{
    int64_t u = 0;
    for (; u + PANEL <= units; u += PANEL)
        transpose_units(rows->data, u * 4, (uint32_t *)panel + u * PANEL);
    for (; u < units; u++)
        for (int lane = 0; lane < PANEL; lane++)
            memcpy(panel + (u * PANEL + lane) * 4, rows->data[lane] + u * 4, 4);
}

/* Any row, element by element: kept as it is stored, or widened to f32. */
static void pack_row(const char *row, int32_t from, int64_t k, int32_t dtype, char *panel, int64_t lane)
{
    for (int64_t i = 0; i < k; i++) {
        if (dtype == DTYPE_F32)
            ((float *)panel)[i * PANEL + lane] = read_element(row + i * element_bytes(from), from);
        else if (dtype == DTYPE_F16)
            memcpy((uint16_t *)panel + i * PANEL + lane, row + i * 2, 2);
        else
            memcpy((uint16_t *)panel + (i / 2 * PANEL + lane) * 2 + i % 2, row + i * 2, 2);
    }
}

static void pack_panel(const struct panel_rows *rows, int64_t k, int32_t dtype, char *panel)
{
    bool plain = rows->count == PANEL && (dtype == DTYPE_F32 || (dtype == DTYPE_BF16 && k % 2 == 0));
    for (int64_t lane = 0; lane < rows->count; lane++)
        plain = plain && rows->dtype[lane] == dtype;
    if (plain) {
        pack_units(rows, dtype == DTYPE_F32 ? k : k / 2, panel);
        return;
    }
    memset(panel, 0, (size_t)panel_bytes(dtype, k)); /* lanes beyond the last row, and the other half of an odd k */
    for (int64_t lane = 0; lane < rows->count; lane++)
        pack_row(rows->data[lane], rows->dtype[lane], k, dtype, panel, lane);
}

static int32_t pack_share(const struct source *sources, int32_t count, struct range panels, int64_t k, int32_t dtype,
                          char *packed)
{
    char *buffer = malloc((size_t)(k * 4 * PANEL));
    int32_t status = buffer ? 0 : -1;
    for (int64_t p = panels.begin; p < panels.end && !status; p++) {
        struct panel_rows rows;
        status = find_rows(sources, count, p * PANEL, (p + 1) * PANEL, k, &rows, buffer);
        if (!status)
            pack_panel(&rows, k, dtype, packed + p * panel_bytes(dtype, k));
    }
    free(buffer);
    return status;
}

int32_t pack_matrix(const struct source *sources, int32_t count, int32_t n, int32_t k, int32_t dtype, void *packed,
                    int32_t threads)
{
    int32_t failed = 0;
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static, 1)
#endif
    for (int32_t t = 0; t < threads; t++) {
        int32_t status = pack_share(sources, count, share_of(round_up(n, PANEL) / PANEL, t, threads), k, dtype, packed);
        if (status) {
#ifdef _OPENMP
#pragma omp atomic write
#endif
            failed = status;
        }
    }
    return failed;
}

int64_t packed_panel_bytes(int32_t dtype, int32_t group, int32_t k)
{
    return is_quantised(dtype) ? quantised_panel_bytes(dtype, group, k) : panel_bytes(dtype, k);
}
