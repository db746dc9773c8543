// Two peers ship versions of pafprocess.cpp; the include path chooses which. C names for what SWIG would wrap.
#include "pafprocess.cpp"

extern "C" {
void paf_process(int p1, int p2, int p3, float *peaks, int h1, int h2, int h3, float *heat, int f1, int f2, int f3, float *paf) {
  process_paf(p1, p2, p3, peaks, h1, h2, h3, heat, f1, f2, f3, paf);
}
int paf_num_humans() { return get_num_humans(); }
float paf_score(int human) { return get_score(human); }
int paf_part_cid(int human, int part) { return get_part_cid(human, part); }
int paf_part_x(int cid) { return get_part_x(cid); }
int paf_part_y(int cid) { return get_part_y(cid); }
float paf_part_score(int cid) { return get_part_score(cid); }

// out [humans, 18, 3]: everybody in one call, which is kinder to the peer than a call for each part.
void paf_humans(float *out) {
  for (int human = 0; human < get_num_humans(); human++)
    for (int part = 0; part < 18; part++, out += 3) {
      const int cid = get_part_cid(human, part);
      out[0] = cid < 0 ? 0 : get_part_x(cid);
      out[1] = cid < 0 ? 0 : get_part_y(cid);
      out[2] = cid < 0 ? 0 : get_part_score(cid);
    }
}
}
