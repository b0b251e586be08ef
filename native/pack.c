/* Reads matrices from files or memory straight into packed panels. */
#define _FILE_OFFSET_BITS 64
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "native.h"

enum { CHUNK = 1 << 18 }; /* bytes of source rows read at once: fits a second-level cache */

static int64_t element_bytes(int32_t dtype) { return dtype == DTYPE_F32 ? 4 : 2; }

/* `bytes` of a source from its row `first`: where it lies in memory, or read into `buffer`. NULL if it ends too soon. */
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

/* A row of weights that keep their dtype: moves bits. */
static void pack_same(const char *row, int32_t dtype, int64_t k, char *panel, int64_t lane)
{
    if (dtype == DTYPE_F32 || dtype == DTYPE_BF16) {
        /* 4-byte units: a float, or a pair of bf16 */
        int64_t units = dtype == DTYPE_F32 ? k : k / 2;
        uint32_t *out = (uint32_t *)panel + lane;
        for (int64_t i = 0; i < units; i++)
            memcpy(out + i * PANEL, row + i * 4, 4);
        if (dtype == DTYPE_BF16 && k % 2) {
            out[units * PANEL] = 0;
            memcpy(out + units * PANEL, row + units * 4, 2);
        }
    } else {
        uint16_t *out = (uint16_t *)panel + lane;
        for (int64_t i = 0; i < k; i++)
            memcpy(out + i * PANEL, row + i * 2, 2);
    }
}

static void pack_widened(const char *row, int32_t dtype, int64_t k, char *panel, int64_t lane)
{
    float *out = (float *)panel + lane;
    for (int64_t i = 0; i < k; i++)
        out[i * PANEL] = read_element(row + i * element_bytes(dtype), dtype);
}

static void pack_row(const struct source *s, const char *row, int64_t k, int32_t dtype, char *panel, int64_t lane)
{
    if (s->dtype == dtype)
        pack_same(row, dtype, k, panel, lane);
    else
        pack_widened(row, s->dtype, k, panel, lane);
}

/* Rows [begin, end) of the stacked sources into their panels. Returns 0, or 1 + the index of a short source. */
static int32_t pack_range(const struct source *sources, int32_t count, int64_t begin, int64_t end, int64_t k,
                          int32_t dtype, char *packed, char *buffer)
{
    int64_t start = 0; /* of the source among all rows */
    for (int32_t s = 0; s < count; start += sources[s++].rows) {
        int64_t row_bytes = k * element_bytes(sources[s].dtype), batch = max_i64(1, CHUNK / row_bytes);
        int64_t first = max_i64(begin, start), last = min_i64(end, start + sources[s].rows);
        for (int64_t row = first; row < last; row += batch) {
            int64_t rows = min_i64(batch, last - row);
            const char *data = read_rows(&sources[s], row - start, rows, row_bytes, buffer);
            if (!data)
                return s + 1;
            for (int64_t i = row; i < row + rows; i++)
                pack_row(&sources[s], data + (i - row) * row_bytes, k, dtype,
                         packed + i / PANEL * panel_bytes(dtype, k), i % PANEL);
        }
    }
    return 0;
}

int32_t pack_matrix(const struct source *sources, int32_t count, int32_t n, int32_t k, int32_t dtype, void *packed,
                    int32_t threads)
{
    int64_t panels = round_up(n, PANEL) / PANEL, bytes = panel_bytes(dtype, k);
    int32_t failed = 0;
    if (n % PANEL)
        memset((char *)packed + (panels - 1) * bytes, 0, (size_t)bytes);
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static, 1)
#endif
    for (int32_t t = 0; t < threads; t++) {
        struct range mine = share_of(panels, t, threads);
        char *buffer = malloc((size_t)max_i64(CHUNK, (int64_t)k * 4));
        int32_t status = buffer ? pack_range(sources, count, mine.begin * PANEL, mine.end * PANEL, k, dtype, packed,
                                             buffer) : 1;
        free(buffer);
        if (status) {
#ifdef _OPENMP
#pragma omp atomic write
#endif
            failed = status;
        }
    }
    return failed;
}
