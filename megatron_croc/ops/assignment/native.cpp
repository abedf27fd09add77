// Exact assignment of the n rows of a cost [n, P], n <= P, on one core.
//
// The algorithm of shortest_paths.py, which explains it: a matching and duals v <= 0 of the columns
// are optimal if
//
//   (1) every row is matched to a column of least c_ij - v_j, and
//   (2) every column with v_j < 0 is matched.
//
// Each stage keeps (1) for the rows that are matched:
//
//   forward   one row after the other. If nobody has its cheapest column, v is 0 there and at most
//             0 elsewhere, and the column is its best. Else the shortest augmenting path is searched
//             (Dijkstra): first among a few cheap columns of each row, known from the pass that
//             found its cheapest one, which is exact while a path is shorter than the cheapest
//             column that this misses; then among all columns. From v = 0 this keeps (2) as well.
//   reverse   needed if some of the columns were searched, from duals near the optimum: then (2)
//             may fail for some of these columns, and (1) for the others. v_j of each unmatched
//             column becomes what (1) allows, in one pass over the whole cost; shortest paths bring
//             those that are still below 0 to 0, or match them.
//
// A row is read 8 columns at a time. All arithmetic is float64 without fused operations, a minimum
// does not depend on an order, and ties go to an unmatched column, then to the lowest: from the
// same duals every processor computes the same bits.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t WIDTH = 8;
constexpr int64_t CHUNK = 8 * WIDTH;  // columns with a minimum of their own
constexpr int64_t GROUPS = 4;  // of lanes that find the cheapest columns of a row
constexpr int64_t SHORT_LIST = 24;  // columns of a shortlist
constexpr int64_t SHORT_PATH = 24;  // rows of a path that is searched in shortlists
constexpr double INFINITE = std::numeric_limits<double>::infinity();

constexpr int64_t OUT_OF_MEMORY = -1;
constexpr int64_t CROWDED = -2;
constexpr int64_t OUT_OF_RANGE = -3;  // a cost is not finite, or a sum of costs would not be

typedef double Doubles __attribute__((vector_size(WIDTH * sizeof(double))));
typedef int64_t Integers __attribute__((vector_size(WIDTH * sizeof(int64_t))));

template <typename T>
struct Wide {
  typedef T Values __attribute__((vector_size(WIDTH * sizeof(T))));
};

// A whole register of costs, for the pass that needs no sums.
template <typename T>
struct Full {
  static constexpr int64_t LANES = WIDTH * sizeof(double) / sizeof(T);
  typedef T Values __attribute__((vector_size(WIDTH * sizeof(double))));
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Place;
  typedef Place Places __attribute__((vector_size(WIDTH * sizeof(double))));
};

// Values of the columns, filled up to whole chunks.
template <typename T>
class PerColumn {
 public:
  PerColumn(int64_t size, T value)
      : padded((size + CHUNK - 1) / CHUNK * CHUNK),
        data(static_cast<T*>(::operator new(padded * sizeof(T), ALIGNMENT))) {
    fill(value);
  }
  ~PerColumn() { ::operator delete(data, ALIGNMENT); }
  PerColumn(const PerColumn&) = delete;
  PerColumn& operator=(const PerColumn&) = delete;

  T& operator[](int64_t column) { return data[column]; }
  T operator[](int64_t column) const { return data[column]; }
  void fill(T value) { std::fill(data, data + padded, value); }

  typename Wide<T>::Values at(int64_t column) const {
    return *reinterpret_cast<const typename Wide<T>::Values*>(data + column);
  }
  void set(int64_t column, typename Wide<T>::Values values) {
    *reinterpret_cast<typename Wide<T>::Values*>(data + column) = values;
  }

 private:
  static constexpr std::align_val_t ALIGNMENT{64};
  int64_t padded;
  T* data;
};

Doubles least(Doubles a, Doubles b) { return a < b ? a : b; }

bool any(Integers mask) {
#ifdef __AVX512F__
  __m512i bits = reinterpret_cast<__m512i>(mask);
  return _mm512_test_epi64_mask(bits, bits) != 0;
#else
  int64_t found = 0;
  for (int64_t lane = 0; lane < WIDTH; ++lane) found |= mask[lane];
  return found != 0;
#endif
}

double least_of(Doubles values) {
  double value = values[0];
  for (int64_t lane = 1; lane < WIDTH; ++lane) value = std::min(value, values[lane]);
  return value;
}

template <typename T>
class Search {
 public:
  Search(const T* cost, int64_t num_rows, int64_t num_columns)
      : cost(cost),
        n(num_rows),
        P(num_columns),
        dual(P, 0.0),
        distance(P, INFINITE),
        short_distance(P, INFINITE),
        chunk_least((P + CHUNK - 1) / CHUNK * WIDTH, INFINITE),
        comes_from(P, 0),
        row_of(P, -1),
        column_of(n, -1) {}

  // Steps; CROWDED if `asked` rows have fewer different first choices than `fewest`.
  int64_t whole(int64_t asked, int64_t fewest) {
    if (first_choices(std::min(asked, n)) < std::min(fewest, n)) return CROWDED;
    shortlists.reset(new Shortlist[n]);
    for (int64_t row = 0; row < n; ++row) {
      int64_t column = cheapest(row, shortlists[row]);
      if (row_of[column] < 0) {  // its v is 0, that of others at most 0: it is the best
        match(row, column);
      } else if (!forward_short(row)) {
        forward(row);
      }
    }
    return num_steps;
  }

  // Steps. `part`: ascending columns to begin with; `duals`: at most 0, of these columns.
  int64_t begin_with(const int64_t* part, const double* duals, int64_t size) {
    std::vector<T> matrix(n * size);
    for (int64_t row = 0; row < n; ++row)
      for (int64_t place = 0; place < size; ++place)
        matrix[row * size + place] = cost[row * P + part[place]];
    Search<T> search(matrix.data(), n, size);
    for (int64_t place = 0; place < size; ++place) search.dual[place] = duals[place];
    for (int64_t row = 0; row < n; ++row) search.forward(row);
    for (int64_t place = 0; place < size; ++place) {
      int64_t column = part[place], row = search.row_of[place];
      dual[column] = search.dual[place];
      row_of[column] = row;
      if (row >= 0) column_of[row] = column;
    }
    num_steps = search.num_steps;
    reverse_all();
    return num_steps;
  }

  // The sum of min_j (c_ij - v_j) over the rows, plus the sum of v: no assignment costs less.
  double bound() {
    double sum = 0.0;
    for (int64_t row = 0; row < n; ++row) sum += begin(row);
    for (int64_t column = 0; column < P; ++column) sum += dual[column];
    return sum;
  }

  const std::vector<int64_t>& columns() const { return column_of; }

 private:
  template <typename Other>
  friend class Search;

  // 8 costs of a row as float64; infinite past its end.
  Doubles costs(const T* line, int64_t at) const {
    typename Wide<T>::Values values;
    if (at + WIDTH <= P) {
      std::memcpy(&values, line + at, sizeof(values));
    } else {
      for (int64_t lane = 0; lane < WIDTH; ++lane)
        values[lane] = at + lane < P ? line[at + lane] : std::numeric_limits<T>::infinity();
    }
    return __builtin_convertvector(values, Doubles);
  }

  double reduced(int64_t row, int64_t column) const {
    return double(cost[row * P + column]) - dual[column];
  }

  // Some of the cheapest columns of a row: of those it misses, none costs less than `limit`.
  struct Shortlist {
    T limit;
    int32_t size;
    std::pair<T, int32_t> entries[SHORT_LIST];  // cost, column
  };

  // Lowest column of the least cost of a row, one pass in T; and the cheapest column of each lane,
  // where it costs less than the second cheapest of any lane.
  int64_t cheapest(int64_t row, Shortlist& shortlist) const {
    typedef Full<T> F;
    constexpr T HIGHEST = std::numeric_limits<T>::infinity();
    const T* line = cost + row * P;
    constexpr int64_t STRIDE = GROUPS * F::LANES;
    typename F::Values lowest[GROUPS], second[GROUPS], nothing{};
    typename F::Places place[GROUPS], now{};
    for (int64_t group = 0; group < GROUPS; ++group) {
      lowest[group] = second[group] = typename F::Values{} + HIGHEST;
      place[group] = typename F::Places{};
    }
    int64_t at = 0;
    for (; at + STRIDE <= P; at += STRIDE) {
      for (int64_t group = 0; group < GROUPS; ++group) {
        typename F::Values values;
        std::memcpy(&values, line + at + group * F::LANES, sizeof(values));
        nothing += values - values;  // not a number if a value is not finite
        typename F::Places is_less = values < lowest[group];
        typename F::Values other = is_less ? lowest[group] : values;
        second[group] = other < second[group] ? other : second[group];
        lowest[group] = is_less ? values : lowest[group];
        place[group] = is_less ? now : place[group];
      }
      now += 1;
    }
    T value = HIGHEST, limit = HIGHEST;
    int64_t column = -1;
    bool is_finite = true;
    for (; at < P; ++at) {
      is_finite = is_finite && line[at] - line[at] == 0;
      limit = std::min(limit, line[at]);
      if (line[at] < value) value = line[at], column = at;
    }
    for (int64_t lane = 0; lane < STRIDE; ++lane) {
      int64_t group = lane / F::LANES, part = lane % F::LANES;
      T cost_here = lowest[group][part];
      int64_t other = place[group][part] * STRIDE + lane;
      limit = std::min(limit, second[group][part]);
      if (cost_here < value || (cost_here == value && other < column))
        value = cost_here, column = other;
    }
    for (int64_t lane = 0; lane < F::LANES; ++lane) is_finite = is_finite && nothing[lane] == 0;
    if (!is_finite) throw std::overflow_error("a cost is not finite");
    shortlist.limit = limit;
    shortlist.size = 0;
    for (int64_t lane = 0; lane < STRIDE; ++lane) {
      int64_t group = lane / F::LANES, part = lane % F::LANES;
      T cost_here = lowest[group][part];
      if (!(cost_here < limit)) continue;
      if (shortlist.size < SHORT_LIST) {
        int32_t column_here = int32_t(place[group][part] * STRIDE + lane);
        shortlist.entries[shortlist.size++] = {cost_here, column_here};
      } else {
        shortlist.limit = std::min(shortlist.limit, cost_here);
      }
    }
    return column;
  }

  // Different first choices of `asked` rows, evenly spread.
  int64_t first_choices(int64_t asked) const {
    std::vector<int64_t> choices;
    Shortlist ignored;
    for (int64_t number = 0; number < asked; ++number)
      choices.push_back(cheapest(number * n / asked, ignored));
    std::sort(choices.begin(), choices.end());
    return std::unique(choices.begin(), choices.end()) - choices.begin();
  }

  void match(int64_t row, int64_t column) {
    column_of[row] = column;
    row_of[column] = row;
  }

  // Match `row` along the shortest path to an unmatched column.
  void forward(int64_t row) {
    scanned.clear();
    double nearest = begin(row);
    int64_t column = nearest_column(nearest);
    comes_from.fill(row);
    while (row_of[column] >= 0) {
      int64_t from = row_of[column];
      double offset = nearest - reduced(from, column);
      scanned.push_back({column, nearest, dual[column]});
      dual[column] = -INFINITE;  // its c - v is infinite from now on
      distance[column] = INFINITE;
      nearest = extend(from, offset);
      column = nearest_column(nearest);
    }
    augment(row, column, nearest);
  }

  // Take the path to `column`, which is `nearest` away.
  void augment(int64_t row, int64_t column, double nearest) {
    for (auto [other, far, before] : scanned) dual[other] = before + (far - nearest);
    while (true) {  // each row of the path leaves its column to the next
      int64_t mover = comes_from[column];
      row_of[column] = mover;
      std::swap(column_of[mover], column);
      if (mover == row) return;
    }
  }

  // `forward` among the columns of shortlists; false, and nothing is changed, if they may not do.
  bool forward_short(int64_t row) {
    scanned.clear();
    touched.clear();
    double offset = 0.0, limit = INFINITE, nearest = 0.0;
    int64_t from = row, column = -1;
    for (int64_t step = 0; step < SHORT_PATH; ++step) {
      const Shortlist& shortlist = shortlists[from];
      limit = std::min(limit, shortlist.limit + offset);  // v <= 0: c - v is not less than c
      for (int64_t entry = 0; entry < shortlist.size; ++entry) {
        auto [value, other] = shortlist.entries[entry];
        double reached = (double(value) - dual[other]) + offset;
        if (!(reached < short_distance[other])) continue;
        if (short_distance[other] == INFINITE) touched.push_back(other);
        short_distance[other] = reached;
        comes_from[other] = from;
      }
      nearest = INFINITE;
      for (int64_t other : touched) nearest = std::min(nearest, short_distance[other]);
      column = P;
      bool is_matched = true;
      for (int64_t other : touched) {
        if (short_distance[other] != nearest) continue;
        bool other_is = row_of[other] >= 0;
        if (other_is < is_matched || (other_is == is_matched && other < column))
          column = other, is_matched = other_is;
      }
      if (!(nearest < limit) || !is_matched) break;
      from = row_of[column];
      offset = nearest - reduced(from, column);
      scanned.push_back({column, nearest, dual[column]});
      dual[column] = -INFINITE;
      short_distance[column] = INFINITE;
    }
    for (int64_t other : touched) short_distance[other] = INFINITE;
    bool is_found = nearest < limit && row_of[column] < 0;
    if (is_found) {
      augment(row, column, nearest);
    } else {
      for (auto [other, far, before] : scanned) dual[other] = before;
    }
    return is_found;
  }

  // Distances by way of `row` alone, which are c - v; return the least.
  double begin(int64_t row) {
    const T* line = cost + row * P;
    return each_column([&](int64_t at) {
      Doubles reached = costs(line, at) - dual.at(at);
      distance.set(at, reached);
      return reached;
    });
  }

  // Shorten distances by way of row `from`; return the least of the columns not yet scanned.
  double extend(int64_t from, double offset) {
    const T* line = cost + from * P;
    Doubles shift = Doubles{} + offset;
    return each_column([&](int64_t at) {
      Doubles reached = (costs(line, at) - dual.at(at)) + shift, known = distance.at(at);
      Integers nearer = reached < known;
      if (any(nearer)) {
        known = nearer ? reached : known;
        distance.set(at, known);
        comes_from.set(at, nearer ? Integers{} + from : comes_from.at(at));
      }
      return known;
    });
  }

  // Least of what `values` returns, over all columns; that of each chunk is kept.
  template <typename Values>
  double each_column(Values values) {
    ++num_steps;
    Doubles lowest = Doubles{} + INFINITE;
    for (int64_t chunk = 0; chunk * CHUNK < P; ++chunk) {
      Doubles here = Doubles{} + INFINITE;
      int64_t end = std::min(P, (chunk + 1) * CHUNK);
      for (int64_t at = chunk * CHUNK; at < end; at += WIDTH) here = least(here, values(at));
      chunk_least.set(chunk * WIDTH, here);
      lowest = least(lowest, here);
    }
    return least_of(lowest);
  }

  // Column at this distance, the least: an unmatched one if there is one, then the lowest.
  int64_t nearest_column(double nearest) const {
    Doubles value = Doubles{} + nearest;
    int64_t found = -1;
    for (int64_t chunk = 0; chunk * CHUNK < P; ++chunk) {
      if (!any(chunk_least.at(chunk * WIDTH) == value)) continue;
      int64_t end = std::min(P, (chunk + 1) * CHUNK);
      for (int64_t at = chunk * CHUNK; at < end; at += WIDTH) {
        Integers there = distance.at(at) == value;
        if (!any(there)) continue;
        for (int64_t lane = 0; lane < WIDTH; ++lane) {
          if (there[lane] == 0) continue;
          if (row_of[at + lane] < 0) return at + lane;
          if (found < 0) found = at + lane;
        }
      }
    }
    if (found < 0 || !(nearest < INFINITE)) throw std::overflow_error("no column in range");
    return found;
  }

  // All rows are matched, (1) holds among the columns that were searched: make (1) and (2) hold.
  void reverse_all() {
    PerColumn<double> limit(P, 0.0);
    for (int64_t row = 0; row < n; ++row) {
      Doubles best = Doubles{} + reduced(row, column_of[row]);
      for (int64_t at = 0; at < P; at += WIDTH)
        limit.set(at, least(limit.at(at), costs(cost + row * P, at) - best));
    }
    for (int64_t column = 0; column < P; ++column)
      if (row_of[column] < 0) dual[column] = limit[column];
    transposed.resize(P);
    for (int64_t column = 0; column < P; ++column)
      if (row_of[column] < 0 && dual[column] < 0.0) reverse(column);
  }

  // Raise the dual of the unmatched column `start` to 0, or match it and free another.
  void reverse(int64_t start) {
    std::vector<double> best(n), far(n);
    std::vector<int64_t> goes_to(n, start);
    std::vector<char> is_scanned(n, 0);
    const double* line = column_values(start);
    for (int64_t row = 0; row < n; ++row) {
      best[row] = reduced(row, column_of[row]);
      far[row] = line[row] - dual[start] - best[row];
    }
    double rise = -dual[start];
    int64_t freed = start;
    scanned.clear();
    while (true) {
      int64_t row = -1;
      double nearest = rise;
      for (int64_t other = 0; other < n; ++other)
        if (!is_scanned[other] && far[other] < nearest) nearest = far[other], row = other;
      if (row < 0) break;
      ++num_steps;
      is_scanned[row] = 1;
      int64_t column = column_of[row];
      scanned.push_back({column, nearest, dual[column]});
      double shift = nearest - dual[column];
      if (shift < rise) freed = column, rise = shift;  // the dual of this column reaches 0 first
      line = column_values(column);
      for (int64_t other = 0; other < n; ++other) {
        double reached = (line[other] - best[other]) + shift;
        bool nearer = !is_scanned[other] && reached < far[other];
        far[other] = nearer ? reached : far[other];
        goes_to[other] = nearer ? column : goes_to[other];
      }
    }
    for (auto [column, distance, before] : scanned)
      dual[column] = std::min(0.0, before + (rise - distance));
    dual[start] = std::min(0.0, dual[start] + rise);
    dual[freed] = 0.0;
    if (freed == start) return;
    int64_t row = row_of[freed];
    row_of[freed] = -1;
    while (true) {
      int64_t column = goes_to[row], before = row_of[column];
      row_of[column] = row;
      column_of[row] = column;
      if (column == start) return;
      row = before;
    }
  }

  // A column of the cost, contiguous; kept, because reverse paths come back to it.
  const double* column_values(int64_t column) {
    std::vector<double>& values = transposed[column];
    if (values.empty()) {
      values.resize(n);
      for (int64_t row = 0; row < n; ++row) values[row] = cost[row * P + column];
    }
    return values.data();
  }

  struct Scanned {
    int64_t column;
    double distance, dual;
  };

  const T* cost;
  int64_t n, P;
  PerColumn<double> dual, distance, short_distance, chunk_least;
  PerColumn<int64_t> comes_from, row_of;
  std::vector<int64_t> column_of;
  std::vector<Scanned> scanned;
  std::vector<int64_t> touched;
  std::unique_ptr<Shortlist[]> shortlists;
  std::vector<std::vector<double>> transposed;
  int64_t num_steps = 0;  // rows and columns that were read one after the other
};

// The arguments of `Search`, then of the search; `index` [n] and `bound`, unless null, are output.
template <typename T>
int64_t assign(const T* cost, int64_t n, int64_t P, int64_t asked, int64_t fewest,
               const int64_t* part, const double* duals, int64_t size, int64_t* index, double* bound) {
  try {
    Search<T> search(cost, n, P);
    int64_t steps = size > 0 ? search.begin_with(part, duals, size) : search.whole(asked, fewest);
    if (steps < 0) return steps;
    std::copy(search.columns().begin(), search.columns().end(), index);
    if (bound != nullptr) *bound = search.bound();
    return steps;
  } catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
  } catch (const std::overflow_error&) {
    return OUT_OF_RANGE;
  }
}

}  // namespace

// 0 < n <= P, and n <= size if a part is given.
extern "C" {
#define ASSIGN(name, T)                                                                          \
  int64_t name(const T* cost, int64_t n, int64_t P, int64_t asked, int64_t fewest,                 \
               const int64_t* part, const double* duals, int64_t size, int64_t* index,             \
               double* bound) {                                                                    \
    return assign(cost, n, P, asked, fewest, part, duals, size, index, bound);                     \
  }
ASSIGN(assign_float32, float)
ASSIGN(assign_float64, double)
}
