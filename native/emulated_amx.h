/* The tile unit (AMX) for tests: the other half of emulated_avx512.h. What faults on hardware, such as a tile without a
 * shape or shapes that do not fit together, is a trap here. */
#ifndef EMULATED_AMX_H
#define EMULATED_AMX_H

#pragma GCC system_header /* some of the names are macros already */

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbsud
#define _tile_loadconfig emulated_tile_loadconfig
#define _tile_release emulated_tile_release
#define _tile_loadd emulated_tile_loadd
#define _tile_stored emulated_tile_stored
#define _tile_zero emulated_tile_zero
#define _tile_dpbf16ps emulated_tile_dpbf16ps
#define _tile_dpbsud emulated_tile_dpbsud

enum { EMULATED_TILES = 8, EMULATED_ROWS = 16, EMULATED_ROW_BYTES = 64 };
struct emulated_tile { int rows, row_bytes; uint8_t row[EMULATED_ROWS][EMULATED_ROW_BYTES]; };
/* One for all sources of a library. */
__attribute__((weak, visibility("hidden"))) _Thread_local struct emulated_tile emulated_tiles[EMULATED_TILES];

EMULATED_INLINE struct emulated_tile *emulated_tile(int t)
{
    emulated_fault_unless(t >= 0 && t < EMULATED_TILES && emulated_tiles[t].rows);
    return &emulated_tiles[t];
}
static inline void _tile_release(void) { memset(emulated_tiles, 0, sizeof emulated_tiles); }
static inline void _tile_loadconfig(const void *p)
{
    struct { uint8_t palette, start, reserved[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } config;
    memcpy(&config, p, sizeof config);
    emulated_fault_unless(config.palette == 1 && !config.start);
    for (int i = 0; i < 14; i++)
        emulated_fault_unless(!config.reserved[i]);
    _tile_release();
    for (int i = 0; i < 16; i++) {
        bool is_tile = i < EMULATED_TILES;
        emulated_fault_unless(config.rows[i] <= (is_tile ? EMULATED_ROWS : 0));
        emulated_fault_unless(config.row_bytes[i] <= EMULATED_ROW_BYTES && !config.rows[i] == !config.row_bytes[i]);
        if (is_tile) {
            emulated_tiles[i].rows = config.rows[i];
            emulated_tiles[i].row_bytes = config.row_bytes[i];
        }
    }
}
static inline void _tile_zero(int to) { memset(emulated_tile(to)->row, 0, sizeof emulated_tiles->row); }
static inline void _tile_loadd(int to, const void *p, int64_t stride)
{
    struct emulated_tile *t = emulated_tile(to);
    _tile_zero(to);
    for (int r = 0; r < t->rows; r++)
        memcpy(t->row[r], (const char *)p + r * stride, (size_t)t->row_bytes);
}
static inline void _tile_stored(int from, void *p, int64_t stride)
{
    const struct emulated_tile *t = emulated_tile(from);
    for (int r = 0; r < t->rows; r++)
        memcpy((char *)p + r * stride, t->row[r], (size_t)t->row_bytes);
}
/* C += A · B of units of 4 bytes, each row of C by `add_row`. */
typedef void emulated_add_row(uint8_t *c, const uint8_t *a, const struct emulated_tile *b);
EMULATED_INLINE void emulated_product(int to, int left, int right, emulated_add_row *add_row)
{
    struct emulated_tile *c = emulated_tile(to), *a = emulated_tile(left), *b = emulated_tile(right);
    emulated_fault_unless(c != a && c != b && a != b && c->rows == a->rows && c->row_bytes == b->row_bytes &&
                          a->row_bytes == 4 * b->rows && c->row_bytes % 4 == 0);
    for (int r = 0; r < c->rows; r++) {
        add_row(c->row[r], a->row[r], b);
        memset(c->row[r] + c->row_bytes, 0, (size_t)(EMULATED_ROW_BYTES - c->row_bytes));
    }
}
/* The products of even and of odd inputs are summed apart, then both, then with C. */
static inline void emulated_add_pairs_of_row(uint8_t *c, const uint8_t *a, const struct emulated_tile *b)
{
    __m256 even[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()}, odd[2] = {even[0], even[0]};
    for (int k = 0; k < b->rows; k++) {
        __m256i x = _mm256_castps_si256(_mm256_broadcast_ss((const float *)a + k));
        for (int i = 0; i < 2; i++) {
            __m256i w = _mm256_loadu_si256((const __m256i *)b->row[k] + i);
            even[i] = emulated_add_product(even[i], emulated_even(x), emulated_even(w));
            odd[i] = emulated_add_product(odd[i], emulated_odd(x), emulated_odd(w));
        }
    }
    for (int i = 0; i < 2; i++) {
        __m256 both = emulated_flush(_mm256_add_ps(even[i], odd[i]));
        __m256 before = emulated_flush(_mm256_loadu_ps((float *)c + 8 * i));
        _mm256_storeu_ps((float *)c + 8 * i, emulated_flush(_mm256_add_ps(before, both)));
    }
}
static inline void emulated_add_quads_of_row(uint8_t *c, const uint8_t *a, const struct emulated_tile *b)
{
    for (int i = 0; i < 2; i++) {
        __m256i sum = _mm256_loadu_si256((const __m256i *)c + i);
        for (int k = 0; k < b->rows; k++)
            sum = emulated_add_quads(sum, _mm256_loadu_si256((const __m256i *)b->row[k] + i),
                                     _mm256_castps_si256(_mm256_broadcast_ss((const float *)a + k)));
        _mm256_storeu_si256((__m256i *)c + i, sum);
    }
}
static inline void _tile_dpbf16ps(int to, int left, int right)
{
    emulated_product(to, left, right, emulated_add_pairs_of_row);
}
static inline void _tile_dpbsud(int to, int left, int right)
{
    emulated_product(to, left, right, emulated_add_quads_of_row);
}
#endif
