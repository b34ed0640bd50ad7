#include "cpu/offline/pack.h"

#include <cstring>
#include <vector>

#include "core/n16.h"
#include "core/parallel.h"

namespace lowbit {
namespace {

void unpack_row(const uint8_t* in, const CanonicalCodes& s, uint8_t* codes) {
  if (s.base) {
    const int per_byte = digits_per_byte(s.base);
    for (int64_t b = 0; b < s.row_bytes; ++b) {
      int value = in[b];
      for (int64_t k = b * per_byte; k < s.k && k < (b + 1) * per_byte; ++k) {
        codes[k] = static_cast<uint8_t>(value % s.base);
        value /= s.base;
      }
    }
    return;
  }
  const uint64_t mask = (uint64_t{1} << s.bits) - 1;
  for (int64_t k = 0; k < s.k; k += 8) {
    // Eight codes fill `bits` bytes; the last ones may be missing.
    uint64_t word = 0;
    const int64_t at = k / 8 * s.bits;
    const int64_t bytes = s.row_bytes - at < s.bits ? s.row_bytes - at : s.bits;
    std::memcpy(&word, in + at, static_cast<size_t>(bytes));
    const int64_t count = s.k - k < 8 ? s.k - k : 8;
    for (int64_t i = 0; i < count; ++i) codes[k + i] = static_cast<uint8_t>(word >> (i * s.bits) & mask);
  }
}

void pack_row(const uint8_t* codes, const CanonicalCodes& s, uint8_t* out) {
  if (s.base) {
    const int per_byte = digits_per_byte(s.base);
    for (int64_t b = 0; b < s.row_bytes; ++b) {
      int value = 0;
      for (int i = per_byte - 1; i >= 0; --i) {
        const int64_t k = b * per_byte + i;
        value = value * s.base + (k < s.k ? codes[k] : 0);
      }
      out[b] = static_cast<uint8_t>(value);
    }
    return;
  }
  for (int64_t k = 0; k < s.k; k += 8) {
    uint64_t word = 0;
    const int64_t count = s.k - k < 8 ? s.k - k : 8;
    for (int64_t i = 0; i < count; ++i) word |= uint64_t{codes[k + i]} << (i * s.bits);
    const int64_t at = k / 8 * s.bits;
    const int64_t bytes = s.row_bytes - at < s.bits ? s.row_bytes - at : s.bits;
    std::memcpy(out + at, &word, static_cast<size_t>(bytes));
  }
}

// The first unit of 16 columns of a chunk, from the first one of a block.
int64_t vector_offset(int64_t n, int64_t chunk, int bits) {
  return chunk * chunk_bytes(bits) + n % kBlockN / kUnitLanes * vector_bytes(bits);
}

// Adds the 32 codes of one column of one chunk to words that hold none of their bits.
void write_chunk(uint8_t* vector, int lane, int bits, const uint8_t* codes) {
  for (int k = 0; k < kChunkK; ++k) {
    const Place place = place_of(bits, k / 2);
    for (int i = 0; i < place.count; ++i) {
      const Piece& piece = place.pieces[i];
      uint8_t* at = vector + piece.unit * kUnitBytes + word_byte(lane, k);
      uint16_t word;
      std::memcpy(&word, at, 2);
      word = static_cast<uint16_t>(word | (codes[k] >> piece.at & ((1 << piece.width) - 1)) << piece.shift);
      std::memcpy(at, &word, 2);
    }
  }
}

void read_chunk(const uint8_t* vector, int lane, int bits, uint8_t* codes) {
  for (int k = 0; k < kChunkK; ++k) {
    const Place place = place_of(bits, k / 2);
    int code = 0;
    for (int i = 0; i < place.count; ++i) {
      const Piece& piece = place.pieces[i];
      uint16_t word;
      std::memcpy(&word, vector + piece.unit * kUnitBytes + word_byte(lane, k), 2);
      code |= (word >> piece.shift & ((1 << piece.width) - 1)) << piece.at;
    }
    codes[k] = static_cast<uint8_t>(code);
  }
}

// A block of codes of 2 bits as trits.
void pack_block(const uint8_t* words, int64_t k, uint8_t* to) {
  constexpr int64_t kStride = chunk_bytes(kTritBits);
  int64_t left = num_chunks(k);
  for (; left >= kTritChunks; left -= kTritChunks, words += kTritChunks * kStride) {
    for (int v = 0; v < kBlockN / kUnitLanes; ++v, to += vector_bytes(kTritUnits)) {
      trits::pack_span(words + v * vector_bytes(kTritBits), kStride, to);
    }
  }
  std::memcpy(to, words, static_cast<size_t>(left * kStride));
}

template <class Fn>
void for_rows(int64_t rows, int threads, const Fn& fn) {
  parallel(rows, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) fn(i);
  });
}

}  // namespace

int digits_per_byte(int base) {
  int count = 0;
  for (int values = base; values <= 256; values *= base) ++count;
  return count;
}

void pack_rows(const uint8_t* codes, const CanonicalCodes& s, uint8_t* packed, int threads) {
  for_rows(s.n, threads, [&](int64_t n) { pack_row(codes + n * s.k, s, packed + n * s.row_bytes); });
}

void unpack_rows(const uint8_t* packed, const CanonicalCodes& s, uint8_t* codes, int threads) {
  for_rows(s.n, threads, [&](int64_t n) { unpack_row(packed + n * s.row_bytes, s, codes + n * s.k); });
}

void prepack(const uint8_t* packed, const CanonicalCodes& s, uint8_t* n16, int threads) {
  const int64_t chunks = num_chunks(s.k), bytes = block_bytes(s.k, s.bits, s.trits());
  for_rows(num_blocks(s.n), threads, [&](int64_t block) {
    std::vector<uint8_t> codes(static_cast<size_t>(chunks * kChunkK)), words;
    const auto size = static_cast<size_t>(chunks * chunk_bytes(s.bits));
    if (s.trits()) words.resize(size);
    uint8_t* to = s.trits() ? words.data() : n16 + block * bytes;
    std::memset(to, 0, size);
    const int64_t n_end = (block + 1) * kBlockN < s.n ? (block + 1) * kBlockN : s.n;
    for (int64_t n = block * kBlockN; n < n_end; ++n) {
      unpack_row(packed + n * s.row_bytes, s, codes.data());
      for (int64_t c = 0; c < chunks; ++c) {
        write_chunk(to + vector_offset(n, c, s.bits), static_cast<int>(n % kUnitLanes), s.bits,
                    codes.data() + c * kChunkK);
      }
    }
    if (s.trits()) pack_block(words.data(), s.k, n16 + block * bytes);
  });
}

void read_row(const uint8_t* n16, int64_t n, int64_t k, int bits, bool trits, uint8_t* codes) {
  const int lane = static_cast<int>(n % kUnitLanes);
  const int64_t chunks = num_chunks(k), spans = trits ? chunks / kTritChunks : 0;
  uint8_t words[kTritChunks * vector_bytes(kTritBits)];  // of a span, those of the column alone
  const uint8_t* at = n16 + n / kBlockN * block_bytes(k, bits, trits);
  for (int64_t c = 0; c < chunks; ++c) {
    const uint8_t* vector = at + vector_offset(n, 0, bits);
    if (c < spans * kTritChunks) {
      if (c % kTritChunks == 0) {
        trits::expand_span<4>(at + vector_offset(n, 0, kTritUnits) + 4 * lane, words + 4 * lane, vector_bytes(bits));
        at += chunk_bytes(kTritUnits);
      }
      vector = words + c % kTritChunks * vector_bytes(bits);
    } else {
      at += chunk_bytes(bits);
    }
    uint8_t chunk[kChunkK];
    read_chunk(vector, lane, bits, chunk);
    const int64_t count = k - c * kChunkK < kChunkK ? k - c * kChunkK : kChunkK;
    std::memcpy(codes + c * kChunkK, chunk, static_cast<size_t>(count));
  }
}

void unprepack(const uint8_t* n16, const CanonicalCodes& s, uint8_t* packed, int threads) {
  for_rows(s.n, threads, [&](int64_t n) {
    std::vector<uint8_t> codes(static_cast<size_t>(s.k));
    read_row(n16, n, s.k, s.bits, s.trits(), codes.data());
    pack_row(codes.data(), s, packed + n * s.row_bytes);
  });
}

}  // namespace lowbit
