#include "amx.h"

#ifdef __AMX_BF16__
#include <immintrin.h>

enum { ROWS = 16, LINES = 16, LINE_BYTES = 64 }; /* of a tile at most */

/* Tiles 0 to 3 hold C, two blocks of rows times two panels; 4 and 5 A, 6 and 7 B. */
struct shape { int32_t rows[2], lines; };

static _Thread_local struct shape current;

/* gcc does not know that tile instructions read memory: what has been written must be there before them. */
#define SETTLE(pointer) __asm__ volatile("" : : "r"(pointer) : "memory")

void amx_begin(void) { current = (struct shape){{0, 0}, 0}; }
void amx_end(void) { _tile_release(); }

static void set_shape(struct shape s)
{
    if (!memcmp(&s, &current, sizeof s))
        return;
    struct { uint8_t palette, start, reserved[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } config = {.palette = 1};
    for (int i = 0; i < 2; i++) {
        for (int j = 0; j < 2; j++) {
            config.rows[2 * i + j] = (uint8_t)s.rows[i];
            config.row_bytes[2 * i + j] = s.rows[i] ? LINE_BYTES : 0;
        }
        config.rows[4 + i] = (uint8_t)s.rows[i];
        config.row_bytes[4 + i] = s.rows[i] ? (uint16_t)(s.lines * 4) : 0;
        config.rows[6 + i] = (uint8_t)s.lines;
        config.row_bytes[6 + i] = LINE_BYTES;
    }
    SETTLE(&config);
    _tile_loadconfig(&config);
    current = s;
}

/* One or two blocks of rows times one or two panels, over lines [from, from + blocks * lines) of each piece. */
static inline __attribute__((always_inline)) void multiply(const struct amx_product *p, const char *a, int64_t panel,
                                                           int64_t from, int64_t blocks, int64_t lines, float *c,
                                                           bool add, const bool two_blocks, const bool two_panels)
{
    int64_t c_row = p->c_row * 4, piece_step = (p->depth + LINES - 1) / LINES * p->a_step;
    float *below = c + ROWS * p->c_row;
    SETTLE(a);
    if (add) {
        _tile_loadd(0, c, c_row);
        if (two_panels)
            _tile_loadd(1, c + PANEL, c_row);
        if (two_blocks)
            _tile_loadd(2, below, c_row);
        if (two_blocks && two_panels)
            _tile_loadd(3, below + PANEL, c_row);
    } else {
        _tile_zero(0);
        if (two_panels)
            _tile_zero(1);
        if (two_blocks)
            _tile_zero(2);
        if (two_blocks && two_panels)
            _tile_zero(3);
    }
    for (int64_t piece = 0; piece < p->pieces; piece++) {
        const char *x = a + piece * piece_step + from / LINES * p->a_step;
        const char *w = p->b[piece] + panel * p->b_column + from * p->b_step;
        for (int64_t i = 0; i < blocks; i++, x += p->a_step, w += lines * p->b_step) {
            if (!two_blocks) /* so few rows wait for memory */
                for (int64_t line = 0; line < lines; line++)
                    FETCH_AHEAD(w + line * p->b_step);
            _tile_loadd(6, w, p->b_step);
            _tile_loadd(4, x, p->a_row);
            _tile_dpbf16ps(0, 4, 6);
            if (two_panels) {
                _tile_loadd(7, w + p->b_column, p->b_step);
                _tile_dpbf16ps(1, 4, 7);
            }
            if (two_blocks) {
                _tile_loadd(5, x + p->a_block, p->a_row);
                _tile_dpbf16ps(2, 5, 6);
                if (two_panels)
                    _tile_dpbf16ps(3, 5, 7);
            }
        }
    }
    _tile_stored(0, c, c_row);
    if (two_panels)
        _tile_stored(1, c + PANEL, c_row);
    if (two_blocks)
        _tile_stored(2, below, c_row);
    if (two_blocks && two_panels)
        _tile_stored(3, below + PANEL, c_row);
}

static void multiply_lines(const struct amx_product *p, int64_t rows, int64_t panels, int64_t from, int64_t blocks,
                           int64_t lines, bool add)
{
    for (int64_t panel = 0; panel < panels; panel += 2)
        for (int64_t row = 0; row < rows; row += 2 * ROWS) {
            int64_t left = rows - row;
            const char *a = p->a + row / ROWS * p->a_block;
            float *c = p->c + row * p->c_row + panel * PANEL;
            bool two_panels = panel + 1 < panels;
            set_shape((struct shape){{(int32_t)min_i64(ROWS, left), (int32_t)max_i64(0, min_i64(ROWS, left - ROWS))},
                                     (int32_t)lines});
            if (left > ROWS && two_panels)
                multiply(p, a, panel, from, blocks, lines, c, add, true, true);
            else if (left > ROWS)
                multiply(p, a, panel, from, blocks, lines, c, add, true, false);
            else if (two_panels)
                multiply(p, a, panel, from, blocks, lines, c, add, false, true);
            else
                multiply(p, a, panel, from, blocks, lines, c, add, false, false);
        }
}

void amx_product(const struct amx_product *p, int64_t rows, int64_t panels)
{
    int64_t whole = p->depth / LINES, rest = p->depth % LINES;
    if (whole)
        multiply_lines(p, rows, panels, 0, whole, LINES, p->add);
    if (rest) /* tiles of another shape */
        multiply_lines(p, rows, panels, whole * LINES, 1, rest, p->add || whole > 0);
}

/* Over lines [from, from + lines) of the panels, added to what the tiles hold. */
static void add_dots(const char *a, int64_t a_row, int64_t rows, const char *const b[2], int64_t from)
{
    _tile_loadd(6, b[0] + from * LINE_BYTES, LINE_BYTES);
    _tile_loadd(7, b[1] + from * LINE_BYTES, LINE_BYTES);
    _tile_loadd(4, a + from * 4, a_row);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    if (rows > ROWS) {
        _tile_loadd(5, a + ROWS * a_row + from * 4, a_row);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
    }
}

void amx_dots(const char *a, int64_t a_row, int64_t rows, const char *const b[2], int64_t quads, int32_t *sums)
{
    const int64_t row_bytes = 2 * PANEL * 4;
    set_shape((struct shape){{(int32_t)min_i64(ROWS, rows), (int32_t)max_i64(0, rows - ROWS)},
                             (int32_t)min_i64(LINES, quads)});
    SETTLE(a);
    SETTLE(b[0]);
    _tile_zero(0);
    _tile_zero(1);
    if (rows > ROWS) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t from = 0; from < quads; from += LINES) /* quads: fewer than LINES, or whole tiles of them */
        add_dots(a, a_row, rows, b, from);
    _tile_stored(0, sums, row_bytes);
    _tile_stored(1, sums + PANEL, row_bytes);
    if (rows > ROWS) {
        _tile_stored(2, sums + ROWS * 2 * PANEL, row_bytes);
        _tile_stored(3, sums + ROWS * 2 * PANEL + PANEL, row_bytes);
    }
    SETTLE(sums);
}

int64_t amx_in_registers(int64_t rounds)
{
    set_shape((struct shape){{ROWS, ROWS}, LINES});
    for (int64_t n = 0; n < rounds; n++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    return rounds * 4 * ROWS * PANEL * LINES * 2;
}
#endif
